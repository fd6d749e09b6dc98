"""Consumer groups and dead letters as seen from outside: lag, reset, delete, replay, discard."""

from datetime import datetime, timedelta, timezone

import pytest
from processes import Seen, appended, started
from servers import eventually

import minibatch as mb
from minibatch import clock, dead, groups, lease, ledger, store
from minibatch.encoding import encode
from minibatch.errors import ArgumentError, GroupBusyError, LeaseLostError
from minibatch.groups import DeadLetters
from minibatch.store import Span
from minibatch.testing import InlineExecutor

START = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)


@pytest.fixture
def stream(url):
    return mb.stream('s', url=url)


@pytest.fixture
def log(stream):
    """The database at majority."""
    return stream.target.majority


def write(log, producer, offset, *seconds):
    """Store a record batch of messages {'v': offset}, created so many seconds after START."""
    times = [START + timedelta(seconds=at) for at in seconds]
    datas = [encode({'v': offset + i}) for i in range(len(times))]
    record = store.record_batch('s', producer, offset, datas, times, [None] * len(times))
    assert store.insert_records(log.buffer, [record]) == (1, '')


def lead(log, name='default', seconds=60.0, token='1', **fields):
    """Take the lease as a consumer; returns its epoch."""
    fields = {'fingerprint': 'f', 'keep': False, 'picks': False, **fields}
    return ledger.take_lease(log, 's', name, lease.owner(token), seconds, token, fields)['lease']['epoch']


def stopped(log, name='default', positions=None, **fields):
    """A group whose consumer has stopped, as it should."""
    epoch = lead(log, name, **fields)
    ledger.write_positions(log, 's', name, epoch, positions or {})
    ledger.release_lease(log, 's', name, epoch, clean=True)


def claim(log, number, *spans, name='default', epoch=1):
    """An open window."""
    id_ = ledger.window_id('s', name, number)
    doc = {
        '_id': id_, 'stream': 's', 'group': name, 'number': number, 'spans': [list(span) for span in spans],
        'n': sum(end - start for _, start, end in spans), 'status': 'open', 'epoch': epoch, 'attempts': 2,
        'created': clock.now(), 'processed': False,
    }  # fmt: skip
    ledger.claim_windows(log, [doc], epoch)
    return id_


def bury(log, number, *spans, name='default', epoch=1, failed=START):
    """A dead letter."""
    id_ = claim(log, number, *spans, name=name, epoch=epoch)
    dead.keep(log, 's', name, id_, [Span(*span) for span in spans], clock.now())
    epitaph = {'error': 'ValueError: bad', 'traceback': 'Traceback: there', 'failed': failed, 'attempts': 3}
    dead.fail(log, {id_: epitaph}, epoch)
    return id_


def positions(log, name='default'):
    return ledger.read_positions(log, 's', name)


# --- what there is


def test_the_groups_of_a_stream_are_listed_with_their_counters(stream, log):
    stopped(log, 'b', keep=True)
    lead(log, 'a')
    counters = {'windows': 1, 'messages': 2, 'failed': 3, 'retried': 4, 'expired_unprocessed': 5, 'stalled': START}
    log.group.update_one({'group': 'b'}, {'$set': counters})
    a, b = stream.groups()
    assert (a.name, b.name, a.stream, a.keep, b.keep) == ('a', 'b', 's', False, True)
    assert (b.windows, b.messages, b.failed, b.retried, b.expired, b.stalled) == (1, 2, 3, 4, 5, START)
    assert a.stalled is None
    assert b == stream.group('b')
    assert 'expired=5' in repr(b)
    assert '_target' not in repr(b)


def test_the_owner_is_who_leads_now_by_the_servers_time(stream, log):
    me = lease.owner('1')
    lead(log)
    assert stream.group().owner == f'{me["host"]}:{me["pid"]}'
    lead(log, seconds=-0.001)
    assert stream.group().owner is None


def test_a_group_that_is_not_there_is_named_with_those_that_are(stream, log):
    with pytest.raises(ArgumentError, match="no consumer group 'default'; there are: none"):
        stream.group()
    stopped(log, 'a')
    with pytest.raises(ArgumentError, match="no consumer group 'x'; there are: 'a'"):
        stream.group('x')
    with pytest.raises(ArgumentError, match="no consumer group 'x'"):
        stream.dead_letters('x')
    assert log.group.count_documents({}) == 1


# --- lag


def test_the_lag_is_what_the_group_has_not_finished(stream, log):
    write(log, 'a', 0, *range(100))
    write(log, 'b', 0, 50)
    stopped(log, positions={'a': 30})
    lag = stream.group().lag()
    assert lag.messages == 71
    assert lag.seconds == pytest.approx((clock.now() - START).total_seconds() - 30, abs=20)
    ledger.write_positions(log, 's', 'default', 1, {'a': 100, 'b': 1})
    assert stream.group().lag() == (0, 0.0)


def test_windows_finished_above_the_position_are_no_lag(stream, log):
    write(log, 'a', 0, *range(100))
    stopped(log, positions={'a': 10})
    log.group.update_one({}, {'$set': {'number': 1}})
    claim(log, 2, ('a', 20, 30))
    claim(log, 1, ('a', 70, 90))  # below the number: long finished
    finished = [claim(log, 3, ('a', 5, 20)), claim(log, 4, ('a', 30, 40), ('b', 0, 7))]
    ledger.commit_windows(log, finished, 1)
    bury(log, 5, ('a', 40, 45))
    lag = stream.group().lag()
    assert lag.messages == 100 - 20 - 15
    assert lag.seconds == pytest.approx((clock.now() - START).total_seconds() - 20, abs=20)


def test_messages_that_are_gone_are_no_lag(stream, log):
    for offset in range(10):
        write(log, 'a', offset, offset)
    stopped(log, positions={'a': 2})
    log.buffer.delete_many({'offset': {'$lt': 6}})
    lag = stream.group().lag()
    assert lag.messages == 4
    assert lag.seconds == pytest.approx((clock.now() - START).total_seconds() - 6, abs=20)
    log.buffer.delete_many({'offset': {'$lt': 9}})
    claim(log, 1, ('a', 8, 10))
    ledger.commit_windows(log, [ledger.window_id('s', 'default', 1)], 1)
    assert stream.group().lag() == (0, 0.0)


def test_a_message_from_the_future_has_no_age(stream, log):
    write(log, 'a', 0, 86400 * 36500)
    stopped(log)
    assert stream.group().lag() == (1, 0.0)


def test_the_lag_costs_the_same_with_any_number_of_messages(stream, log, db):
    for offset in range(300):
        write(log, 'a', offset, offset)
    stopped(log, positions={'a': 10})
    db.command('profile', 2)
    assert stream.group().lag().messages == 290
    db.command('profile', 0)
    read = list(db['system.profile'].find({'ns': f'{db.name}.buffer'}))
    assert read
    assert sum(doc['docsExamined'] + doc['keysExamined'] for doc in read) < 20


# --- reset


@pytest.mark.parametrize(
    ('to', 'a', 'b'),
    [
        ('earliest', 3, 0),
        ('latest', 9, 2),
        (START + timedelta(seconds=15), 5, 0),
        (datetime(2026, 1, 31, 12, 0, 30), 7, 0),
        (START.astimezone(timezone(timedelta(hours=5))) + timedelta(seconds=100.5), 9, 1),
        (START + timedelta(days=1), 9, 2),
        (START - timedelta(days=1), 3, 0),
    ],
)
def test_a_group_is_reset_to_either_end_or_to_a_time(stream, log, to, a, b):
    write(log, 'a', 3, 0, 10, 20, 25)  # 3 to 6
    write(log, 'a', 7, 30)
    write(log, 'a', 8, 40)
    write(log, 'b', 0, 100)
    write(log, 'b', 1, 200)
    stopped(log, positions={'a': 5, 'gone': 70})
    stream.group().reset(to)
    assert positions(log) == {'a': a, 'b': b, 'gone': 70}
    assert {doc['epoch'] for doc in log.position.find()} == {2}
    assert stream.group().lag().messages == 9 - a + 2 - b == groups.messages_from(stream.group(), to)


def test_a_time_finds_the_first_message_also_where_a_clock_went_backwards(stream, log):
    write(log, 'a', 0, 0, 50, 10)
    write(log, 'a', 3, 20)
    write(log, 'a', 4, 60)
    stopped(log)
    stream.group().reset(START + timedelta(seconds=40))
    assert positions(log) == {'a': 1}


def test_a_reset_changes_neither_function_nor_options_and_needs_no_void_window_after_a_clean_stop(stream, log):
    write(log, 'a', 0, 0)
    stopped(log, keep=True)
    log.group.update_one({}, {'$set': {'frontier': START, 'stalled': START, 'windows': 7}})
    stream.group().reset('latest')
    doc = log.group.find_one()
    assert (doc['fingerprint'], doc['keep'], doc['picks'], doc['windows']) == ('f', True, False, 7)
    assert not {'frontier', 'stalled', 'reset'} & set(doc)
    assert log.window.count_documents({}) == 0
    taken = ledger.take_lease(log, 's', 'default', lease.owner('2'), 60, '', {})
    assert (taken['clean'], taken['lease']['epoch']) == (True, 3)


def test_a_group_that_is_led_is_neither_reset_nor_deleted(stream, log):
    write(log, 'a', 0, 0)
    lead(log)
    before = log.group.find_one()
    group = stream.group()
    me = lease.owner('1')
    for refused in (lambda: group.reset('latest'), group.delete):
        with pytest.raises(GroupBusyError, match=f"'default' of stream 's' is led by process {me['pid']} on .*stop it"):
            refused()
    assert log.group.find_one() == before
    assert positions(log) == {}


def test_a_leader_on_this_host_that_is_dead_is_no_leader(stream, log):
    write(log, 'a', 0, 0)
    dead = {**lease.owner('1'), 'started': 0.0}
    ledger.take_lease(log, 's', 'default', dead, 60, '', {})
    stream.group().reset('latest')
    assert positions(log) == {'a': 1}


def test_a_consumer_that_hung_can_do_nothing_after_a_reset(stream, log):
    write(log, 'a', 0, *range(20))
    epoch = lead(log, seconds=0.0)
    first = claim(log, 1, ('a', 0, 5), epoch=epoch)
    stream.group().reset('earliest')
    with pytest.raises(LeaseLostError):
        claim(log, 2, ('a', 5, 10), epoch=epoch)
    with pytest.raises(LeaseLostError):
        ledger.commit_windows(log, [first], epoch)
    with pytest.raises(LeaseLostError):
        ledger.write_positions(log, 's', 'default', epoch, {'a': 10})
    with pytest.raises(LeaseLostError):
        ledger.write_progress(log, 's', 'default', epoch, {'number': 1}, {})
    assert positions(log) == {'a': 0}
    assert [(doc['number'], doc['status']) for doc in log.window.find()] == [(2, 'void')]
    assert log.group.find_one()['number'] == 2


def test_a_reset_leaves_dead_letters_and_goes_on_behind_all_numbers(stream, log):
    write(log, 'a', 0, *range(20))
    stopped(log, positions={'a': 5})
    bury(log, 1, ('a', 0, 5))
    claim(log, 2, ('a', 5, 10))
    bury(log, 3, ('a', 10, 15))
    stream.dead_letters()[0].replay()
    stream.group().reset('earliest')
    assert [(letter.number, letter.waiting) for letter in stream.dead_letters()] == [(1, True), (3, False)]
    assert log.group.find_one()['number'] == 3
    assert log.window.count_documents({'status': 'open'}) == 0
    assert stream.group().lag().messages == 20


def test_what_was_marked_as_processed_is_cleaned_up_again_after_a_reset(stream, log):
    write(log, 'a', 0, *range(20))
    write(log, 'b', 0, *range(20))
    stopped(log, positions={'a': 10, 'b': 10})
    ledger.write_cleaned(log, 's', 'default', {'a': 10, 'b': 5})
    stream.group().reset(START + timedelta(seconds=7))
    assert ledger.read_cleaned(log, 's', 'default') == {'a': 7, 'b': 5}


@pytest.mark.parametrize('to', ['first', None, 5, '2026-01-31'])
def test_a_place_that_is_none_is_refused(stream, log, to):
    stopped(log)
    with pytest.raises(ArgumentError, match="to must be 'earliest', 'latest' or a datetime, not"):
        stream.group().reset(to)


def test_a_group_that_picks_messages_itself_is_not_reset(stream, log):
    stopped(log, picks=True)
    with pytest.raises(ArgumentError, match="'default' of stream 's' picks messages itself"):
        stream.group().reset('latest')
    assert lead(log) == 3


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    'write_', ['fence', 'reset_group', 'write_positions', 'write_cleaned', 'sweep_windows', 'release_lease']
)
def test_a_reset_that_is_killed_anywhere_is_not_done_or_is_finished_by_the_next(stream, log, monkeypatch, write_):
    write(log, 'a', 0, *range(20))
    epoch = lead(log, seconds=0.0)
    ledger.write_positions(log, 's', 'default', epoch, {'a': 10})
    ledger.write_cleaned(log, 's', 'default', {'a': 10})
    claim(log, 1, ('a', 10, 15), epoch=epoch)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, write_, killed)
        with pytest.raises(KeyboardInterrupt):
            stream.group().reset('earliest')
    log.group.update_one({}, {'$set': {'lease.expires': clock.now()}})
    doc = log.group.find_one()
    done = write_ not in ('fence', 'reset_group')
    assert (doc['number'] > 0) == done
    if 'reset' in doc:
        ledger.finish_reset(log, 's', 'default', doc['lease']['epoch'], doc['reset'])
    assert positions(log) == {'a': 0 if done else 10}
    assert log.window.count_documents({'status': 'open', 'number': {'$gt': doc['number']}}) == (not done)
    stream.group().reset('earliest')  # and it may be done again
    assert (positions(log), ledger.read_cleaned(log, 's', 'default')) == ({'a': 0}, {'a': 0})
    assert log.window.count_documents({'status': 'open'}) == 0
    assert 'reset' not in log.group.find_one()


def numbered(window):
    return window.number, [data['seq'] for data in window.data]


def consume(stream, fn=numbered, **options):
    """Process what is due, in windows of 5; what the sink was given."""
    results = Seen()
    options = {'size': 5, 'executor': InlineExecutor, 'sink': results, **options}
    mb.make_emitter('s', fn, stream=stream, **options)._run_once()
    return list(results)


def test_a_consumer_goes_on_where_its_group_was_reset_to_with_numbers_of_its_own(stream):
    appended(stream, 0, 0, 12)
    assert consume(stream, keep=True) == [(1, [0, 1, 2, 3, 4]), (2, [5, 6, 7, 8, 9])]
    assert stream.group().lag().messages == 2
    stream.group().reset('earliest')
    assert stream.group().lag().messages == 12
    assert consume(stream, keep=True) == [(3, [0, 1, 2, 3, 4]), (4, [5, 6, 7, 8, 9])]
    stream.group().reset('latest')
    appended(stream, 0, 12, 17)
    assert consume(stream, keep=True) == [(5, [12, 13, 14, 15, 16])]
    group = stream.group()
    assert (group.lag(), group.windows, group.messages) == ((0, 0.0), 5, 25)


@pytest.mark.parametrize('write_', ['write_positions', 'write_cleaned', 'sweep_windows'])
def test_the_next_consumer_finishes_a_reset_that_was_killed(stream, log, monkeypatch, write_):
    appended(stream, 0, 0, 10)
    consume(stream, keep=True)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, write_, killed)
        with pytest.raises(KeyboardInterrupt):
            stream.group().reset('earliest')
    assert [seen for _, seen in consume(stream, keep=True)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert 'reset' not in log.group.find_one()


# --- delete


def test_a_deleted_group_leaves_its_lease_and_number_alone(stream, log):
    write(log, 'a', 0, *range(20))
    epoch = lead(log, seconds=0.0)
    ledger.write_positions(log, 's', 'default', epoch, {'a': 5})
    bury(log, 1, ('a', 0, 5))
    claim(log, 2, ('a', 5, 10))
    group = stream.group()
    group.delete()
    (doc,) = log.group.find()
    assert {'_id', 'stream', 'group', 'lease', 'number', 'deleted'} <= set(doc)
    assert not {'fingerprint', 'keep', 'picks', 'windows', 'started', 'frontier', 'reset'} & set(doc)
    assert (doc['lease']['epoch'], doc['number']) == (2, 3)
    assert log.position.count_documents({}) == log.dead.count_documents({}) == 0
    assert [(window['number'], window['status']) for window in log.window.find()] == [(3, 'void')]
    assert stream.groups() == stream.dead_letters() == []
    for refused in (group.lag, group.delete, lambda: group.reset('latest'), stream.group):
        with pytest.raises(ArgumentError, match="no consumer group 'default'; there are: none"):
            refused()


def test_a_consumer_that_hung_can_do_nothing_after_its_group_was_deleted(stream, log):
    write(log, 'a', 0, *range(20))
    epoch = lead(log, seconds=0.0)
    first = claim(log, 1, ('a', 0, 5), epoch=epoch)
    stream.group().delete()
    with pytest.raises(LeaseLostError):
        claim(log, 2, ('a', 5, 10), epoch=epoch)
    with pytest.raises(LeaseLostError):
        ledger.commit_windows(log, [first], epoch)
    with pytest.raises(LeaseLostError):
        ledger.write_progress(log, 's', 'default', epoch, {'number': 1}, {})


def test_messages_do_not_wait_for_a_deleted_group(stream, log):
    stopped(log, 'a')
    stopped(log, 'b', positions={'p': 7})
    assert ledger.released(log, 's', 'b', {'p': 7}) == ({'p': 0}, False)
    stream.group('a').delete()
    assert ledger.released(log, 's', 'b', {'p': 7}) == ({'p': 7}, False)
    assert [group.name for group in stream.groups()] == ['b']


def test_groups_and_streams_whose_names_begin_alike_are_left_alone(stream, log):
    for stream_, group in (('s', 'g'), ('s', 'g2'), ('s/g', 'x')):
        epoch = ledger.take_lease(log, stream_, group, lease.owner('1'), 0.0, '', {})['lease']['epoch']
        ledger.write_positions(log, stream_, group, epoch, {'a': 5})
        id_ = ledger.window_id(stream_, group, 1)
        log.window.insert_one({'_id': id_, 'stream': stream_, 'group': group, 'number': 1, 'status': 'failed'})
        log.dead.insert_one({'_id': f'{id_}+000000', 'stream': stream_, 'group': group})
    stream.group('g').delete()
    for collection in (log.position, log.dead):
        assert {(doc['stream'], doc['group']) for doc in collection.find()} == {('s', 'g2'), ('s/g', 'x')}
    assert log.window.count_documents({'status': 'failed'}) == 2


@pytest.mark.parametrize('write_', ['fence', 'delete_group', 'clear_group'])
def test_a_deletion_that_is_killed_anywhere_is_not_done_or_done(stream, log, monkeypatch, write_):
    write(log, 'a', 0, *range(20))
    epoch = lead(log, seconds=0.0)
    ledger.write_positions(log, 's', 'default', epoch, {'a': 10})
    bury(log, 1, ('a', 0, 10))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, write_, killed)
        with pytest.raises(KeyboardInterrupt):
            stream.group().delete()
    if write_ == 'clear_group':
        assert stream.groups() == []
        doc = log.group.find_one()
        ledger.clear_group(log, 's', 'default', doc['lease']['epoch'], doc['number'])
    else:
        assert (positions(log), len(stream.dead_letters())) == ({'a': 10}, 1)
        stream.group().delete()
    assert log.position.count_documents({}) == log.dead.count_documents({}) == 0


def test_a_group_is_made_anew_by_the_next_consumer(stream):
    appended(stream, 0, 0, 10)
    assert consume(stream, keep=True) == [(1, [0, 1, 2, 3, 4]), (2, [5, 6, 7, 8, 9])]
    stream.group().delete()
    assert stream.window().count() == 0
    assert consume(stream, keep=True) == [(3, [0, 1, 2, 3, 4]), (4, [5, 6, 7, 8, 9])]
    group = stream.group()
    assert (group.windows, group.messages) == (2, 10)


def test_the_next_consumer_finishes_a_deletion_that_was_killed(stream, log, monkeypatch):
    appended(stream, 0, 0, 10)
    consume(stream, keep=True)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, 'clear_group', killed)
        with pytest.raises(KeyboardInterrupt):
            stream.group().delete()
    assert log.position.count_documents({}) == 1
    assert [seen for _, seen in consume(stream, keep=True)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert stream.group().messages == 10


# --- dead letters


def test_dead_letters_are_listed_by_the_time_they_failed(stream, log):
    write(log, 'a', 0, *range(20))
    stopped(log)
    stopped(log, 'other')
    later = bury(log, 1, ('a', 0, 5), failed=START + timedelta(seconds=1))
    sooner = bury(log, 2, ('a', 5, 10), failed=START)
    other = bury(log, 1, ('a', 0, 5), name='other', failed=START + timedelta(seconds=2))
    assert [letter.id for letter in stream.dead_letters()] == [sooner, later, other]
    assert [letter.id for letter in stream.dead_letters('other')] == [other]
    letter = stream.dead_letters()[0]
    assert (letter.stream, letter.group, letter.number, letter.n, letter.attempts) == ('s', 'default', 2, 5, 3)
    assert (letter.error, letter.failed, letter.start, letter.end) == ('ValueError: bad', START, None, None)
    assert not letter.waiting
    assert '_target' not in repr(letter)


def test_a_dead_letter_reads_its_messages_where_the_log_has_gone_on(stream, log):
    write(log, 'a', 0, *range(10))
    write(log, 'b', 0, 4.5)
    stopped(log)
    bury(log, 1, ('a', 3, 6), ('b', 0, 1))
    log.buffer.delete_many({})
    (letter,) = stream.dead_letters()
    assert letter.spans == [Span('a', 3, 6), Span('b', 0, 1)]
    assert [data['v'] for data in letter.data] == [3, 4, 0, 5]
    places = [(message.producer, message.offset) for message in letter.messages]
    assert places == [('a', 3), ('a', 4), ('b', 0), ('a', 5)]
    assert letter.messages[0].created == START + timedelta(seconds=3)
    assert letter.traceback == 'Traceback: there'
    assert (letter.load().missing, len(letter.load()), letter.load().id) == (0, 4, letter.id)
    log.dead.delete_many({'producer': 'b'})
    assert letter.load().missing == 1


def test_a_list_of_dead_letters_reads_no_messages_and_nothing_long(stream, log, db):
    write(log, 'a', 0, *range(10))
    stopped(log)
    bury(log, 1, ('a', 0, 5))
    db.command('profile', 2)
    stream.dead_letters()
    db.command('profile', 0)
    read = list(db['system.profile'].find({'op': {'$in': ['query', 'getmore']}}))
    assert [doc['ns'] for doc in read] == [f'{db.name}.window']
    assert 'dead' in read[0]['planSummary'] or 'stream: 1, group: 1, number: 1' in read[0]['planSummary']
    (found,) = dead.find(log, 's')
    assert not {'spans', 'traceback'} & set(found)


def test_a_replayed_dead_letter_waits_for_the_consumer_of_its_group(stream, log):
    write(log, 'a', 0, *range(10))
    stopped(log)
    id_ = bury(log, 1, ('a', 0, 5))
    (letter,) = stream.dead_letters()
    letter.replay()
    letter.replay()
    (letter,) = stream.dead_letters()
    assert letter.waiting
    (taken,) = dead.take_replays(log, 's', 'default', 2)
    assert (taken['_id'], taken['tried'], taken['attempts']) == (id_, 3, 4)
    letter.replay()  # it runs already, and is not begun again
    assert log.window.find_one()['epoch'] == 2
    with pytest.raises(ArgumentError, match='waits to be run again'):
        letter.discard()
    assert log.dead.count_documents({}) == 1
    ledger.commit_windows(log, [id_], 2)
    dead.drop(log, [id_], windows=False)  # of a group that keeps its windows
    for gone in (letter.replay, letter.discard, letter.load):
        with pytest.raises(ArgumentError, match='there is no dead letter'):
            gone()


def test_a_discarded_dead_letter_is_gone_with_its_messages(stream, log):
    write(log, 'a', 0, *range(10))
    stopped(log)
    bury(log, 1, ('a', 0, 5))
    kept = bury(log, 2, ('a', 5, 10))
    gone, _ = stream.dead_letters()
    gone.discard()
    assert [letter.id for letter in stream.dead_letters()] == [kept]
    assert [doc['_id'] for doc in log.dead.find()] == [f'{kept}+000000000']
    for refused in (gone.discard, gone.replay, gone.load, lambda: gone.data, lambda: gone.traceback):
        with pytest.raises(ArgumentError, match=f"there is no dead letter '{gone.id}'; it was replayed or discarded"):
            refused()


def test_many_are_replayed_and_discarded_together_and_those_that_wait_stay(stream, log, monkeypatch):
    monkeypatch.setattr(groups, 'CHUNK', 2)
    write(log, 'a', 0, *range(10))
    stopped(log)
    for number in range(1, 6):
        bury(log, number, ('a', 0, 5))
    letters = stream.dead_letters()
    assert DeadLetters(letters[:2]).replay() == 2
    assert letters.discard() == 3
    assert [letter.number for letter in stream.dead_letters()] == [1, 2]
    assert letters.replay() == 0
    assert log.dead.count_documents({}) == 2
    assert DeadLetters().discard() == 0


def test_ids_that_are_no_dead_letters_are_named_and_nothing_is_done(stream, log):
    write(log, 'a', 0, *range(10))
    stopped(log)
    id_ = bury(log, 1, ('a', 0, 5))
    open_ = claim(log, 2, ('a', 5, 10))
    assert [letter.id for letter in groups.dead_letters_by_id(stream.target, [id_, id_])] == [id_]
    with pytest.raises(ArgumentError, match=f"no dead letter '{open_}', 'x'"):
        groups.dead_letters_by_id(stream.target, [id_, open_, 'x'])


def test_a_dead_letter_of_a_consumer_is_replayed_by_the_next_one(stream, log):
    def poisoned(window):
        if window.number == 1:
            raise ValueError('poison')
        return numbered(window)

    appended(stream, 0, 0, 10)
    assert consume(stream, poisoned, max_attempts=1) == [(2, [5, 6, 7, 8, 9])]
    (letter,) = stream.dead_letters()
    assert (letter.error, [data['seq'] for data in letter.data]) == ('ValueError: poison', [0, 1, 2, 3, 4])
    assert stream.group().failed == 1
    assert stream.group().lag() == (0, 0.0)
    letter.replay()
    results = Seen()
    options = {'size': 5, 'executor': InlineExecutor, 'sink': results}
    with started(mb.make_emitter('s', numbered, stream=stream, **options)):
        eventually(lambda: not stream.dead_letters())
    assert list(results) == [(1, [0, 1, 2, 3, 4])]
    assert log.dead.count_documents({}) == 0
