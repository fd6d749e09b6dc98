"""The project keeps its own rules: layout, imports, exports, help texts, packaging."""

import ast
import configparser
import inspect
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click
import pytest

import minibatch
from minibatch import errors
from minibatch.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'minibatch'

# Imports point from a higher level to the same or a lower one. '' is the package itself, __init__.py.
LEVELS = {
    0: {'errors', 'abc', 'clock', 'jsontext', 'signals', 'text'},
    1: {'connection', 'embedded', 'encoding', 'unreadable', 'store', 'ledger', 'dead', 'fields', 'functions',
        'marshaller', 'metrics'},
    2: {'backlog', 'settings', 'lease', 'messages', 'models', 'groups', 'producer', 'named',
        'attached', 'tail'},
    3: {'assign', 'away', 'edges', 'emitter', 'kinds', 'progress', 'retention', 'stall', 'wakeup', 'window', 'consumer',
        'planner', 'delivery', 'beside', 'worker', 'executors', 'overview', 'job', 'inbox', 'crew',
        'dispatch', 'reading'},
    4: {'api', 'cli', 'demo', 'testing', 'contracts', 'contrib', '', '__main__'},
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}

MAY_IMPORT_CONTRIB = {'cli', 'demo', 'contrib'}
MAY_HOLD_OPERATORS = {
    'store', 'ledger', 'dead', 'contrib.mongodb.sink', 'contrib.mongodb.polling', 'contrib.mongodb.changes',
}
DBREF_FIELDS = {'$ref', '$id', '$db'}  # names inside a value, which tell MongoDB to do nothing
PUBLIC_TO_CONTRIB = {'', 'abc', 'connection', 'errors', 'functions', 'jsontext', 'marshaller', 'named', 'contrib'}


def room(module):
    """The name in LEVELS that a module belongs to: 'contrib.apps.x' lives in 'contrib'."""
    return module.partition('.')[0]


def find_modules(package):
    """{dotted name below the package: path}; '' is the package's own __init__.py."""
    modules = {}
    for path in sorted(package.rglob('*.py')):
        parts = list(path.relative_to(package).with_suffix('').parts)
        if parts[-1] == '__init__':
            parts.pop()
        modules['.'.join(parts)] = path
    return modules


def imported_modules(module, path, known):
    """The modules of this package that a file imports, also inside its functions and `if TYPE_CHECKING:`."""
    package = ['minibatch', *filter(None, module.split('.'))]
    if path.name != '__init__.py':
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = '.'.join(above + ([node.module] if node.module else []))
            names = [f'{base}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            if name != 'minibatch' and not name.startswith('minibatch.'):
                continue
            below = name.partition('.')[2]
            # `from minibatch.store import insert` names a function: cut until a module is left.
            while below and below not in known:
                below = below.rpartition('.')[0]
            yield below


MODULES = find_modules(PACKAGE)
ARROWS = sorted({
    (module, imported)
    for module, path in MODULES.items()
    for imported in imported_modules(module, path, MODULES)
    if imported != module
})


def test_every_module_has_its_place_in_the_layout():
    assert {room(module) for module in MODULES} <= LEVEL_OF.keys()


@pytest.mark.parametrize('module', MODULES)
def test_every_module_says_in_its_docstring_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding='utf-8')))


def test_the_tree_of_errors_shows_each_error_once():
    tree = re.findall(r'── (\w+)', errors.__doc__)
    assert sorted(tree) == sorted(name for name in vars(errors) if name.endswith('Error') and name != 'MinibatchError')


def test_imports_never_point_to_a_higher_level():
    wrong = [
        f'{module} imports {imported or "minibatch"}'
        for module, imported in ARROWS
        if LEVEL_OF[room(imported)] > LEVEL_OF[room(module)]
    ]
    assert wrong == []


def test_no_two_modules_import_each_other():
    graph = {module: {imported for source, imported in ARROWS if source == module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f'import cycle: {" <- ".join(name or "minibatch" for name in error.args[1])}')


def test_the_core_never_imports_contrib():
    wrong = [
        f'{module or "minibatch"} imports {imported}'
        for module, imported in ARROWS
        if room(imported) == 'contrib' and room(module) not in MAY_IMPORT_CONTRIB
    ]
    assert wrong == []


def test_contrib_imports_public_names_only():
    wrong = [
        f'{module} imports {imported}'
        for module, imported in ARROWS
        if room(module) == 'contrib' and room(imported) not in PUBLIC_TO_CONTRIB
    ]
    assert wrong == []


def test_only_the_modules_of_queries_contain_mongodb_operators():
    wrong = [
        f'{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}'
        for module, path in MODULES.items()
        if module not in MAY_HOLD_OPERATORS
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Constant)
        and re.match(r'\$[a-zA-Z]', str(node.value))
        and node.value not in DBREF_FIELDS
    ]
    assert wrong == []


@pytest.mark.parametrize('name', ['stream', 'streaming'])
def test_no_module_hides_a_function_of_the_package(name):
    assert name not in {room(module) for module in MODULES}


def public_names():
    return sorted(name for name in minibatch.__all__ if not name.startswith('__'))


@pytest.mark.parametrize('name', public_names())
def test_every_export_exists_and_has_a_docstring(name):
    exported = getattr(minibatch, name)
    # A class or an instance may inherit the docstring of its parent, which says nothing about it.
    docstring = exported.__dict__.get('__doc__') if inspect.isclass(exported) else exported.__doc__
    assert docstring


@pytest.mark.parametrize('name', public_names())
def test_every_export_is_in_the_reference(name):
    reference = (ROOT / 'docs' / 'reference.rst').read_text(encoding='utf-8')
    documented = set(re.findall(r'^\.\. auto\w+:: (\S+)', reference, re.MULTILINE))
    home = getattr(getattr(minibatch, name), '__module__', None)
    assert documented & {f'minibatch.{name}', f'{home}.{name}', home}


def commands(command, words=('minibatch',)):
    """Every command below a click command, with the words a user types for it."""
    yield words, command
    for name, inner in getattr(command, 'commands', {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = {' '.join(words): command for words, command in commands(main)}
OPTIONS = {
    f'{words} {option.opts[0]}': option
    for words, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
}


@pytest.mark.parametrize('words', COMMANDS)
def test_every_command_has_help(words):
    assert COMMANDS[words].help


@pytest.mark.parametrize('words', OPTIONS)
def test_every_option_has_help(words):
    assert OPTIONS[words].help


def read_extras():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    return config['options.extras_require']


@pytest.mark.parametrize('file', ['Dockerfile', 'examples/service/Dockerfile'])
def test_an_image_is_built_from_what_dockerignore_lets_through(file):
    ignored, *let_through = [line for line in read_lines(ROOT / '.dockerignore') if not line.startswith('#')]
    copied = [
        path
        for line in read_lines(ROOT / file) if line.startswith('COPY ')
        for path in line.split()[1:-1]
    ]  # fmt: skip
    assert ignored == '*'
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    assert {f'!{path}' for path in copied} <= set(let_through)


def read_lines(path):
    return path.read_text(encoding='utf-8').splitlines()


def test_the_extra_all_brings_every_extra_but_omegaml_and_the_development_tools():
    extras = read_extras()
    brought = re.fullmatch(r'minibatch\[(.*)\]', extras['all'].strip()).group(1).split(',')
    assert sorted(brought) == sorted(set(extras) - {'all', 'omegaml', 'dev'})


def test_no_reader_is_told_to_install_what_has_this_name_on_the_package_index():
    texts = [ROOT / 'README.rst', ROOT / 'CONTRIBUTING.rst', ROOT / 'CHANGELOG.rst', ROOT / 'Dockerfile']
    texts += [path for folder in ('docs', 'examples', 'minibatch', 'benchmarks') for path in (ROOT / folder).rglob('*')]
    told = [
        (path.name, line)
        for path in texts
        if path.suffix in ('.rst', '.py', '.html', '.txt') or path.name == 'Dockerfile'
        for line in path.read_text(encoding='utf-8').splitlines()
        if re.search(r"""pip3? install[^`]*[ '"]minibatch(?!.* @ git\+)""", line)
    ]
    assert told == []


def test_the_version_is_that_of_the_first_heading_of_the_changes():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg', encoding='utf-8')
    heading = (ROOT / 'CHANGELOG.rst').read_text(encoding='utf-8').splitlines()[3]
    assert heading.split()[0] == config['metadata']['version']


def test_every_file_of_contrib_has_an_extra_of_its_name():
    needed = {module.split('.')[1] for module in MODULES if module.startswith('contrib.')}
    assert needed <= set(read_extras())


def test_importing_minibatch_brings_no_optional_and_no_command_line_package():
    unwanted = {
        'celery', 'click', 'dask', 'distributed', 'flask', 'kafka', 'mongomock', 'omegaml', 'paho', 'prometheus_client',
        'rich', 'minibatch.cli', 'minibatch.contrib', 'minibatch.demo', 'minibatch.testing',
    }
    program = 'import sys, minibatch; print("\\n".join(sys.modules))'
    loaded = subprocess.check_output([sys.executable, '-c', program], text=True, cwd=ROOT).split()
    assert unwanted & set(loaded) == set()
