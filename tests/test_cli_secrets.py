"""The password in a URL comes out nowhere: not in errors, logs, reprs, dead letters or JSON."""

import io
import logging
import traceback

import pytest
from click.testing import CliRunner
from servers import eventually, free_port

import minibatch as mb
from minibatch.cli import main
from minibatch.connection import masked, masked_text, target

URLS = [
    'mongodb://me:geheim@h/x', 'mongodb+srv://me:geheim@h/x', 'mongodb://me:geheim@h,h2:27017/x?replicaSet=a',
    'mongodb://me:geheim@h:port/x', 'mongodb://:geheim@h/x', 'MONGODB://me:geheim@h/x', 'me:geheim@h', '//me:geheim@h',
    'mongodb://me:ge:geheim@h/x', 'mongodb://me:ge@geheim@h/x', 'mongodb://me:ge/geheim@h/x',
    'mongodb://me:ge?geheim@h/x', 'mongodb://me:ge#geheim@h/x', 'mongodb://me:ge%geheim@h/x',
    'mongodb://me:ge geheim@h/x', 'mongodb://me:ge\ngeheim@h/x', 'mongodb://me:ge\u2100geheim@h/x',
    'mongodb://me:geheim', 'mongodb://me:1geheim', 'mongodb://me:geheim/x',
    'mongodb://h/x?tlsCertificateKeyFilePassword=geheim', 'mongodb://h/x?sslPEMPassphrase=geheim',
    'mongodb://h/x?authMechanismProperties=AWS_SESSION_TOKEN:geheim',
]  # fmt: skip


@pytest.mark.filterwarnings('ignore::UserWarning')  # of pymongo, of options that it does not know
@pytest.mark.parametrize('url', URLS)
def test_a_password_is_masked_in_errors_and_reprs_however_the_url_is_wrong(url):
    said = masked(url)
    try:
        where = target(url)
        said += repr(where)
        assert where.client
    except mb.MinibatchError:
        said += traceback.format_exc()
    assert 'geheim' not in said
    assert '***' in said


@pytest.mark.parametrize('url', [
    'mongodb://h:27017', 'mongodb://h:27017/x?w=1', 'mongodb://[::1]:27017/x', 'mongodb://a:1,b:2/x', 'mongodb://me@h/x',
    'mongodb://%2Ftmp%2Fx.sock/x?directConnection=true',
])  # fmt: skip
def test_a_url_without_a_secret_stays_as_it_is(url):
    assert masked(url) == url


def test_urls_are_masked_inside_a_text():
    text = "it's 'mqtt://me:geheim@h:1883/x' (see https://h:80: no), MongoClient(\"mongodb://u:ge@heim@h\")\nnext: line"
    assert masked_text(text) == (
        "it's 'mqtt://me:***@h:1883/x' (see https://h:80: no), MongoClient(\"mongodb://u:***@h\")\nnext: line"
    )


@pytest.mark.parametrize('words', [
    'streams', 'streams --json', 'lag s', 'lag s --json', 'groups list', 'groups list --json', 'dead list', 'tail s',
    'append s', 'append s --json', 'reset s g --to latest --yes', '--debug streams', 'demo',
])  # fmt: skip
@pytest.mark.parametrize('place', ['option', 'environment', 'argument'])
def test_no_command_prints_the_password_of_a_url(words, place):
    if place == 'argument' and words.endswith('--yes'):
        pytest.skip('it takes no more arguments')
    url = f'mongodb://me:geheim@127.0.0.1:{free_port()}/x?serverSelectionTimeoutMS=100'
    more, env = {'option': (['--url', url], {}), 'environment': ([], {'MONGO_URL': url}),
                 'argument': ([url, url, url], {'MONGO_URL': url})}[place]  # fmt: skip
    result = CliRunner().invoke(main, [*words.split(), *more], env=env, input='{}')
    assert result.exit_code == (2 if place == 'argument' else 1)
    assert '***' in result.stderr
    assert 'geheim' not in result.output


def test_the_error_of_a_function_does_not_bring_a_password_into_logs_and_dead_letters(url):
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger('minibatch').addHandler(handler)

    def leaks(window):
        raise ValueError('no answer from mqtt://me:geheim@h:1883')

    stream = mb.stream('s', url=url)
    stream.append({})
    emitter = mb.make_emitter('s', leaks, size=1, url=url, workers=1, max_attempts=1)
    emitter.start()
    try:
        (letter,) = eventually(stream.dead_letters, 30)
    finally:
        emitter.stop()
        logging.getLogger('minibatch').removeHandler(handler)
    said = CliRunner().invoke(main, ['dead', 'show', letter.id, '--json', '--url', url]).output
    for text in (log.getvalue(), letter.error, letter.traceback, said):
        assert 'mqtt://me:***@h:1883' in text
        assert 'geheim' not in text
