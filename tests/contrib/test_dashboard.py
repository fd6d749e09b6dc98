"""The dashboard in a real browser: what it shows of streams in every state, what its buttons do, what it must not."""

import json
import os
import re
import shutil
import time
from datetime import datetime

import pytest
from pymongo import MongoClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from servers import Mongod, eventually, missing

import minibatch as mb
from minibatch.contrib.apps import StreamingApp
from minibatch.testing import InlineExecutor

TOKEN = 'correct-horse'
EVIL = '<script>document.title="pwned"</script><img src=x onerror=\'document.title="pwned"\'>'


@pytest.fixture(scope='module')
def chromium():
    program, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not program or not driver:
        missing('chromium and chromedriver are not there: make services')
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--hide-scrollbars'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


class Page:
    """A page in the browser."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, address, width=1280, scheme='light'):
        self.browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
            'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 500,
        })
        features = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': features})
        self.browser.get(address)
        self.browser.execute_script('sessionStorage.clear()')
        self.browser.get(address)
        return self

    @property
    def text(self):
        return self.browser.find_element(By.TAG_NAME, 'body').text

    def shows(self, *texts):
        """Wait until all of these are to be seen."""
        eventually(lambda: all(text in self.text for text in texts), 15, f'{texts} not in:\n{self.text}')
        return self

    def hides(self, text):
        eventually(lambda: text not in self.text, 15, f'{text} in:\n{self.text}')
        return self

    def find(self, selector):
        return eventually(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))[0]

    def click(self, text, within='body'):
        def clicked():
            for element in self.browser.find_elements(By.CSS_SELECTOR, f'{within} :is(button, summary)'):
                if element.is_displayed() and element.text == text:
                    element.click()
                    return True
            return False

        eventually(clicked, message=f'no button {text!r} in:\n{self.text}')
        return self

    def run(self, script, *args):
        return self.browser.execute_script(f'return {script}', *args)

    def complaints(self):
        """What the browser has complained of, but for answers that are no success."""
        return [entry['message'] for entry in self.browser.get_log('browser') if entry['source'] != 'network']


@pytest.fixture
def page(chromium):
    chromium.get_log('browser')
    page = Page(chromium)
    yield page
    chromium.get('about:blank')
    assert page.complaints() == []


@pytest.fixture
def serve(url):
    """Serve an app on `url`; its address."""
    made = []

    def serve(**options):
        made.append(StreamingApp(**{'uri': url, 'token': TOKEN, **options}))
        return made[-1].start(port=0)

    yield serve
    for app in made:
        app.stop(0)


def process(url, fn=lambda window: None, name='test', size=2, **options):
    emitter = mb.make_emitter(name, fn, url=url, size=size, executor=InlineExecutor, **options)
    while emitter._run_once():
        pass


def fail(window):
    raise ValueError(f'cannot read {EVIL}')


@pytest.fixture
def letters(url):
    """Three dead letters, and all that may come from outside has script in it."""
    mb.stream(EVIL, url=url).append_many({'text': EVIL, EVIL.replace('.', ''): i} for i in range(6))
    process(url, fail, EVIL, max_attempts=1, group=EVIL.replace('/', ''))
    return mb.stream(EVIL, url=url)


def test_without_streams_it_says_how_to_append_the_first_message(page, serve, url):
    address = serve(name='hub')
    page.open(address).shows('hub', 'all well', 'No streams yet', "mb.stream('readings').append")
    page.shows(f'curl {address}/streams/readings')
    mb.stream('readings', url=url).append({'celsius': 20.5})
    page.shows('readings', '1 appended, 1 stored', 'Nobody processes this stream yet').hides('No streams yet')


def test_a_stream_and_its_group_are_shown_as_they_change(page, serve, url):
    stream = mb.stream('test', url=url)
    stream.append_many({'i': i} for i in range(5))
    process(url)
    page.open(serve()).shows('test', '5 appended', 'default', 'no consumer runs', '4 messages in 2 windows')
    page.shows('1 messages, ')
    stream.append_many({'i': i} for i in range(10))
    process(url)
    page.shows('15 appended', '14 messages in 7 windows')
    rate = page.find('.chart svg').get_attribute('aria-label')
    assert re.match(r'Rate: \S+ messages/s, at most \S+ in the last 1 min', rate)
    paths = '[...document.querySelectorAll("path.out, path.in")].map(path => path.getAttribute("d") || "")'
    eventually(lambda: any(re.match(r'M[\d.]+ [\d.]+L', path) for path in page.run(paths)))


def test_of_many_streams_those_without_a_consumer_are_a_line_each_at_the_end(page, serve, url):
    for i in range(4):
        mb.stream(f'quiet-{i}', url=url).append({'i': i})
    mb.stream('used', url=url).append({'i': 0})
    process(url, name='used', size=1)
    for width in (1280, 390):
        page.open(serve(), width).shows('used', 'quiet-3', 'no consumer yet, ')
        names = page.run('[...document.querySelectorAll(".stream h2")].map(each => each.textContent)')
        assert names == ['used', 'quiet-0', 'quiet-1', 'quiet-2', 'quiet-3']
        assert 'Nobody processes this stream yet' not in page.text
        heights = page.run('[...document.querySelectorAll(".stream.compact")].map(each => each.offsetHeight)')
        assert (len(heights), max(heights) < (60 if width == 1280 else 120)) == (4, True), heights
        assert page.run('document.documentElement.scrollWidth') == width
        page.click('Messages as they arrive', '.compact').shows('{"i":0}')


def test_charts_go_on_after_the_page_is_loaded_again(page, serve, url):
    stream, address = mb.stream('test', url=url), serve()
    process(url)
    page.open(address)
    for i in range(3):
        stream.append({'i': i})
        page.shows(f'{i + 1} appended')
    first = page.run('samples[0].time')
    page.browser.refresh()
    page.shows('3 appended')
    assert page.run('samples[0].time') == first
    eventually(lambda: (page.find('path.in').get_attribute('d') or '').count('L') >= 2)


def test_what_comes_from_outside_is_text(page, serve, letters):
    page.open(serve(name=EVIL)).shows(EVIL, '3 dead letters').click('3 dead letters')
    page.shows(f'ValueError: cannot read {EVIL}')
    page.click('Messages and traceback').shows('Traceback (most recent call last)')
    page.click('Messages as they arrive')
    letters.append({'live': EVIL})
    page.shows('"live":"<script>')
    assert page.run('document.title') == EVIL
    assert page.run('document.querySelectorAll("main img, main script, header img").length') == 0


def test_the_page_has_no_way_to_parse_html_and_asks_nobody_else():
    page = (os.path.dirname(mb.__file__), 'contrib', 'apps', 'dashboard.html')
    with open(os.path.join(*page), encoding='utf-8') as file:
        text = file.read()
    parsers = r'innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|srcdoc|eval\(|new Function'
    assert not re.findall(parsers, text)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert re.findall(r'https?://[^\s\'"]+', text) == ['http://www.w3.org/2000/svg'] * 2
    assert len(text.splitlines()) < 700


def test_times_are_short_and_no_powers_of_ten(page, serve):
    shown = {
        0.0000012: '1.2 µs', 0.0000994: '99 µs', 0.0000996: '100 µs', 0.0003: '300 µs', 0.000999: '999 µs',
        0.0009996: '1.0 ms', 0.0023: '2.3 ms', 0.0994: '99 ms', 0.3: '300 ms', None: '\N{EN DASH}',
    }  # fmt: skip
    assert page.open(serve()).run('arguments[0].map(seconds)', list(shown)) == list(shown.values())


def test_a_long_figure_does_not_reach_into_the_next_one(page, serve, url):
    mb.stream('test', url=url).append({'i': 0})
    process(url, size=1)
    page.open(serve(), 390).shows('a window')
    page.run('document.querySelectorAll(".value small").forEach(unit => { unit.textContent = "x ".repeat(60); })')
    charts = '[...document.querySelectorAll(".chart")]'
    assert page.run(f'{charts}.filter(chart => chart.scrollWidth > chart.clientWidth + 1)') == []
    tops = page.run(f'{charts}.map(chart => chart.querySelector("svg").getBoundingClientRect().top)')
    assert len(set(tops)) == 2  # rows


def test_the_policy_lets_no_other_script_run(page, serve):
    page.open(serve()).shows('No streams yet')
    page.run("""(() => { const it = document.createElement('script'); it.textContent = 'document.title = "pwned"';
                         document.body.append(it); })()""")
    assert page.run('document.title') == 'minibatch'
    assert 'Content Security Policy' in page.complaints()[0]


def test_the_header_leads_to_dead_letters(page, serve, letters):
    page.open(serve()).shows('3 dead letters')
    link = page.find('#dead')
    assert (link.text, 'all well' in page.text) == ('3 dead letters', False)
    link.click()
    page.shows('ValueError: cannot read')
    assert page.run('document.activeElement.textContent') == '3 dead letters'
    for letter in letters.dead_letters():
        letter.discard()
    page.shows('all well').hides('dead letter')


def test_the_header_counts_late_messages_and_leads_to_their_group(page, serve, url):
    mb.stream('test', url=url).append_many({'t': second} for second in (1, 30, 2))
    process(url, size=None, interval=10, timestamp='t')
    page.open(serve()).shows('1 late message', 'Late', 'all well')
    page.find('#late').click()
    assert page.run("document.querySelector('.group').getBoundingClientRect().top") < 900


def test_a_dead_letter_is_replayed_and_discarded_with_the_token(page, serve, letters):
    page.open(serve()).click('3 dead letters').click('Replay').shows('The token the app was started with')
    secret = page.find('#secret')
    assert page.run('document.activeElement.id') == 'secret'
    secret.send_keys('wrong-token', Keys.ENTER)
    page.shows('The token is wrong')
    page.find('#secret').send_keys(TOKEN, Keys.ENTER)
    page.shows('waits to be run again', 'unlocked')
    assert [letter.waiting for letter in letters.dead_letters()] == [False, False, True]
    page.click('Discard', '.letters').shows('Discard for good?')
    assert len(letters.dead_letters()) == 3
    page.click('Discard for good?').shows('2 dead letters')
    assert len(letters.dead_letters()) == 2
    page.click('Replay all').shows('waits to be run again')
    eventually(lambda: all(letter.waiting for letter in letters.dead_letters()))
    assert page.run('JSON.stringify(localStorage) + document.cookie') == '{}'


def test_all_dead_letters_of_a_group_are_discarded(page, serve, letters):
    page.open(serve()).click('Unlock').find('#secret').send_keys(TOKEN, Keys.ENTER)
    page.click('3 dead letters').click('Discard all').click('Discard for good?').hides('dead letters')
    assert letters.dead_letters() == []


def test_what_is_shown_and_discarded_is_that_of_the_name(page, serve, url):
    names = ['odom', '/odom', 'x/../odom', '..', 'odom\n', 'constructor']
    page.open(serve()).shows('No streams yet')
    for name in names:
        mb.stream(name, url=url).append({'bad': name})
        process(url, fail, name, size=1, max_attempts=1, group=name.replace('/', '|'))
        mb.stream(name, url=url).append({'from': name})
    page.shows(f'{len(names)} dead letters').click('Unlock').find('#secret').send_keys(TOKEN, Keys.ENTER)
    for i, name in enumerate(names):
        stream = f'[aria-label={json.dumps("Stream " + name)[:-1].replace(chr(92) + "n", chr(92) + "a ")}"]'
        page.click('Messages as they arrive', stream).shows(json.dumps({'from': name}, separators=(',', ':')))
        page.click('1 dead letter', stream).click('Discard', stream).click('Discard for good?', stream)
        left = names[i + 1 :]
        eventually(lambda left=left: dead(url, names) == left, message=f'{dead(url, names)} is not {left}')


def dead(url, names):
    return [name for name in names if mb.stream(name, url=url).dead_letters()]


def test_without_a_token_there_is_nothing_to_change(page, serve, letters):
    page.open(serve(token=None)).shows('read-only').click('3 dead letters').shows('ValueError')
    assert not [each.text for each in page.browser.find_elements(By.TAG_NAME, 'button') if each.is_displayed()]


def test_a_private_page_asks_for_the_token(page, serve, url):
    mb.stream('hidden', url=url)
    page.open(serve(private=True)).shows('This dashboard is private').click('Enter token')
    page.find('#secret').send_keys(TOKEN, Keys.ENTER)
    page.shows('hidden').hides('This dashboard is private')


def test_messages_are_shown_as_they_arrive(page, serve, url):
    stream = mb.stream('test', url=url)
    stream.append({'first': 1})
    page.open(serve()).click('Messages as they arrive').shows('{"first":1}')
    stream.append({'second': datetime(2026, 1, 31)})
    page.shows('{"second":{"$date":"2026-01-31T00:00:00Z"}}')


def test_a_stalled_group_or_one_whose_source_fails_is_pointed_out(page, serve, url, db):
    mb.stream('test', url=url).append({'i': 0})
    process(url)
    lease = {'expires': datetime(2100, 1, 1), 'owner': {'host': 'h', 'pid': 1}, 'epoch': 1}
    db.group.update_one({}, {'$set': {'stalled': datetime(2026, 1, 31), 'lease': lease}})
    page.open(serve()).shows('Needs a look', "stream 'test', group 'default': windows wait")
    page.shows('stalled for', '1 problem', 'h:1')
    assert page.run('document.title') == '(1) minibatch'
    db.group.update_one({}, {'$set': {'source_error': 'OSError: <b>no broker'}, '$unset': {'stalled': 1}})
    page.shows('its source has failed', 'started again: OSError: <b>no broker', '1 problem')


def test_a_consumer_that_dies_is_pointed_out(page, url):
    def broken(url):
        time.sleep(0.2)
        raise RuntimeError('no such sensor')

    with StreamingApp(uri=url) as app:
        address = app.start(port=0)
        app.start_streaming(broken)
        page.open(address).shows('broken', 'Needs a look', 'RuntimeError: no such sensor', 'restart')


def test_it_says_when_the_database_is_gone_and_goes_on_when_it_is_back(page, serve):
    with Mongod() as server:
        uri = server.url('test') + '&serverSelectionTimeoutMS=500'
        mb.stream('test', url=uri).append({'i': 0})
        address = serve(uri=uri)
        page.open(address).shows('1 appended')
        server.kill()
        page.shows('No database', 'MongoDB does not answer at', '1 appended')  # what was known stays
        assert float(page.find('.streams').value_of_css_property('opacity')) < 1
        page.browser.refresh()
        page.shows('Waiting for MongoDB')
        server.start()
        with MongoClient(uri) as client:
            eventually(lambda: client.admin.command('hello')['isWritablePrimary'])
        page.shows('all well', '1 appended').hides('No database')


def test_it_says_when_the_app_is_gone_and_goes_on_when_it_is_back(page, url):
    app = StreamingApp(uri=url)
    page.open(app.start(port=0)).shows('No streams yet')
    port = int(app.address.rpartition(':')[2])
    app.stop()
    page.shows('The app does not answer', 'no connection')
    with app:
        app.start(port=port)
        page.shows('all well').hides('The app does not answer')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 768, 1280])
def test_it_fits_phones_and_desktops_and_can_be_read_light_and_dark(page, serve, url, letters, width, scheme):
    mb.stream('a-name-without-any-blank-' + 'x' * 150, url=url).append({'text': 'y' * 3000})
    process(url, name='a-name-without-any-blank-' + 'x' * 150, size=1, group='g' * 150)
    page.open(serve(), width, scheme).shows('3 dead letters').click('3 dead letters').click('Messages and traceback')
    page.click('Messages as they arrive').shows('Traceback')
    assert page.run('document.documentElement.scrollWidth') == width
    assert page.run(CONTRASTS) == []
    assert page.run(SMALL) == []


# Texts with less contrast to what is behind them than WCAG AA asks for.
CONTRASTS = """(() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = color => parts(color).map(linear).reduce((sum, v, i) => sum + v * ([.2126, .7152, .0722][i] || 0), 0);
    const behind = node => {
        const color = getComputedStyle(node).backgroundColor;
        return (parts(color)[3] ?? 1) ? color : behind(node.parentElement);
    };
    const hasText = node => node.offsetParent && [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
    const ratio = node => {
        const [high, low] = [getComputedStyle(node).color, behind(node)].map(light).sort((a, b) => b - a);
        return (high + .05) / (low + .05);
    };
    return [...document.querySelectorAll('body *')].filter(node => hasText(node) && ratio(node) < 4.5)
        .map(node => [ratio(node), node.className || node.tagName, node.textContent.slice(0, 40)]);
})()"""

# Buttons too small for a finger, and what has no name for a screen reader.
SMALL = """[...document.querySelectorAll('button, summary, input')].filter(n => n.offsetParent &&
    (n.getBoundingClientRect().height < 24 || !(n.textContent || n.labels?.length))).map(n => n.outerHTML)"""
