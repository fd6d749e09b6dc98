"""The documentation: its pictures are true, its code is code, what it says is printed is printed, its links resolve."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = [*sorted(path for path in DOCS.rglob('*.rst') if '_build' not in path.parts), ROOT / 'README.rst']

# What a literal block without a language starts with, when it is not Python: commands, and drawings of text.
COMMANDS = re.compile(r'(minibatch|make|pip|python3?|docker|curl|export|eval|gunicorn|\$) ')
DRAWN = re.compile(r'[┌└│─┐]')


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def literals(path):
    """The literal blocks of a page, each with its language; that of a plain one is empty."""
    quiet = {'report_level': 5, 'halt_level': 5, 'syntax_highlight': 'none'}
    tree = docutils.core.publish_doctree(path.read_text(encoding='utf-8'), settings_overrides=quiet)
    nodes = [node for node in tree.findall(docutils.nodes.literal_block) if node.parent.tagname != 'system_message']
    return [(''.join(c for c in node['classes'] if c != 'code'), node.astext(), node) for node in nodes]


def is_python(language, text):
    return language == 'python' or not (language or COMMANDS.match(text) or DRAWN.search(text))


def shown():
    """The scripts of the pages that are followed by what they print."""
    scripts = []
    for path in PAGES:
        found = literals(path)
        for (language, code, node), (after, output, printed) in itertools.pairwise(found):
            between = node.next_node(descend=False, siblings=True, ascend=True)
            if (language, after) == ('python', 'text') and between.astext() == 'It prints:':
                assert between.next_node(descend=False, siblings=True) is printed
                scripts.append(pytest.param(code, output, id=f'{name_of(path)}:{len(scripts)}'))
    return scripts


def drawing():
    spec = importlib.util.spec_from_file_location('draw_windows', DOCS / 'draw_windows.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DRAWING = drawing()


@pytest.mark.parametrize('name', DRAWING.KINDS)
def test_the_picture_of_a_window_is_what_minibatch_makes_now(name):
    committed = (DOCS / 'windows' / f'{name}.svg').read_text(encoding='utf-8')
    assert committed == DRAWING.picture(DRAWING.KINDS[name]), 'run: python docs/draw_windows.py'


def test_the_guide_shows_each_picture():
    guide = (DOCS / 'guide.rst').read_text(encoding='utf-8')
    assert sorted(re.findall(r'\.\. image:: windows/(\w+)\.svg', guide)) == sorted(DRAWING.KINDS)


@pytest.mark.parametrize('path', PAGES, ids=name_of)
def test_each_block_of_a_page_that_is_not_marked_as_something_else_is_python_that_compiles(path):
    for language, text, _ in literals(path):
        if is_python(language, text):
            compile(text, f'<{name_of(path)}>', 'exec')


@pytest.mark.parametrize(('code', 'output'), shown())
def test_a_script_of_the_documentation_prints_what_the_page_says(code, output, tmp_path, url, monkeypatch):
    monkeypatch.setenv('MINIBATCH_MONGO_URL', url)
    script = tmp_path / 'script.py'
    script.write_text(code, encoding='utf-8')
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines() == output.strip().splitlines()


@pytest.mark.parametrize('path', PAGES, ids=name_of)
def test_each_link_to_a_file_of_the_project_resolves(path):
    text = path.read_text(encoding='utf-8')
    targets = re.findall(r'`[^`]*<([^`>]+)>`_', text)
    targets += re.findall(r'^ *\.\. (?:image|include|literalinclude):: (\S+)', text, re.MULTILINE)
    files = [target.split('#')[0] for target in targets if '://' not in target]
    assert [file for file in files if not (path.parent / file).exists()] == []


def test_the_pages_build_without_a_warning_and_no_reference_is_left_open(tmp_path):
    build = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', '-d', tmp_path / 'trees']
    done = subprocess.run([*build, DOCS, tmp_path / 'html'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / 'html').rglob('*.html'):
        targets = re.findall(r'(?:href|src)="([^"#:?]+)(?:[#?][^"]*)?"', page.read_text(encoding='utf-8'))
        assert [target for target in targets if not (page.parent / target).exists()] == [], page.name


def test_each_name_in_the_walk_of_a_message_exists():
    text = (DOCS / 'architecture.rst').read_text(encoding='utf-8').partition('The walk of a message')[2]
    named = re.findall(r'``(\w+\.py): ([\w.]+)``', text)
    assert len(named) > 20
    for file, name in named:
        within = ast.parse((ROOT / 'minibatch' / file).read_text(encoding='utf-8'))
        for part in name.split('.'):
            kinds = (ast.ClassDef, ast.FunctionDef)
            found = [node for node in within.body if isinstance(node, kinds) and node.name == part]
            assert found, f'{file}: {name}'
            within = found[0]
