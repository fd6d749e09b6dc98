"""Datasets of omega|ml: with the package itself where it is installed, and with a stand-in for what is used of it.

The package is large and stays out of the development environment. To run the tests with it::

    python -m venv /tmp/om && /tmp/om/bin/pip install 'omegaml[client]' pytest loky '.[embedded]'
    PYTHONPATH=. /tmp/om/bin/python -m pytest tests/contrib/test_omegaml.py
"""

import importlib.util
from types import SimpleNamespace

import pytest
from bson.errors import InvalidDocument
from pymongo import MongoClient
from servers import eventually

import minibatch as mb
from minibatch.contracts import SinkContract, SourceContract
from minibatch.contrib.omegaml import DatasetSink, DatasetSource
from minibatch.errors import ArgumentError, DataError

pandas = pytest.importorskip('pandas')


class Datasets:
    """What omega|ml's documentation says of om.datasets, as far as the adapters use it."""

    def __init__(self, db):
        self.db, self.known = db, {}

    def metadata(self, name):
        return self.known.get(name)

    def collection(self, name):
        wrapped = self.db[f'omega_{name}']
        return SimpleNamespace(database=wrapped.database, name=wrapped.name, insert_many=wrapped.insert_many)

    def put(self, obj, name, append=True):
        assert append
        kind = 'pandas.rawdict'
        if isinstance(obj, pandas.DataFrame):
            kind = 'pandas.dfrows'
            rows = [{**row, '_om#rowid': i} for i, row in enumerate(obj.to_dict('records'))]
            for row in rows:
                if any(type(value) is object for value in row.values()):
                    raise InvalidDocument('cannot encode object')
            self.db[f'omega_{name}'].insert_many(rows)
        elif isinstance(obj, dict):
            kind = 'python.data'
            self.db[f'omega_{name}'].insert_one({'data': obj})
        elif isinstance(obj, bytes):
            self.known[name] = SimpleNamespace(kind='python.file', collection=None)
            return
        self.known[name] = SimpleNamespace(kind=kind, collection=f'omega_{name}')

    def get(self, name):
        rows = self.db[f'omega_{name}'].find({}, {'_id': 0, '_om#rowid': 0})
        return pandas.DataFrame(list(rows))


@pytest.fixture(params=['stand-in', pytest.param('omegaml', marks=pytest.mark.filterwarnings('ignore'))])
def om(request, url):
    if request.param == 'stand-in':
        with MongoClient(url) as client:
            yield SimpleNamespace(datasets=Datasets(client.get_default_database()))
    elif importlib.util.find_spec('omegaml') is None:
        pytest.skip('omegaml is not installed; the docstring of this file says how to run this')
    else:
        from omegaml.omega import Omega

        yield Omega(mongo_url=url)


def put_file(om, name):
    """A dataset without a collection."""
    if isinstance(om.datasets, Datasets):
        om.datasets.put(b'', name)
    else:
        import numpy

        om.datasets.put(numpy.zeros(3), name)


def rows(om, name):
    """What the dataset has, as omega|ml gives it."""
    return om.datasets.get(name).to_dict('records')


class TestDatasetSource(SourceContract):
    @pytest.fixture(autouse=True)
    def dataset(self, om, url):
        self.om, self.url = om, url

    def make(self):
        return DatasetSource(self.om, 'numbers', delay=0.05)

    def send(self, numbers):
        self.om.datasets.collection('numbers').insert_many([{'i': number} for number in numbers])


class TestDatasetSinkOfDocuments(SinkContract):
    @pytest.fixture(autouse=True)
    def dataset(self, om):
        self.om = om

    def make(self):
        return DatasetSink(self.om, 'results')

    def received(self):
        return rows(self.om, 'results')


class TestDatasetSinkOfDataFrames(SinkContract):
    @pytest.fixture(autouse=True)
    def dataset(self, om):
        self.om = om

    def make(self):
        if self.om.datasets.metadata('results') is None:
            self.om.datasets.put(pandas.DataFrame({'i': [-1]}), 'results')
        return DatasetSink(self.om, 'results')

    def received(self):
        return rows(self.om, 'results')[1:]


def test_a_source_brings_the_rows_of_a_dataframe(om, url):
    om.datasets.put(pandas.DataFrame({'a': [1, 2], 'b': ['x', 'y']}), 'frame')
    stream = mb.stream('frames', url=url)
    stream.attach(DatasetSource(om, 'frame', delay=0.05))
    try:
        brought = eventually(lambda: [data for doc in stream.buffer() for data in doc.batch or [doc.data]])
    finally:
        stream.stop()
    assert [(row['a'], row['b'], row['_om#rowid']) for row in brought] == [(1, 'x', 0), (2, 'y', 1)]


def test_source_and_sink_make_a_dataset_of_documents_that_is_not_there(om):
    DatasetSource(om, 'orders')
    assert om.datasets.metadata('orders').kind == 'pandas.rawdict'
    sink = DatasetSink(om, 'results')
    assert om.datasets.metadata('results') is None
    sink.put({'a': 1})
    assert om.datasets.metadata('results').kind == 'pandas.rawdict'
    assert rows(om, 'results') == [{'a': 1}]


def test_a_dataframe_makes_a_dataset_of_dataframes_which_is_not_changed(om):
    frame = pandas.DataFrame({'a': [1, 2]})
    sink = DatasetSink(om, 'results')
    sink.put(frame)
    sink.put([{'a': 3}])
    sink.put(frame[:0])
    assert om.datasets.metadata('results').kind == 'pandas.dfrows'
    assert rows(om, 'results') == [{'a': 1}, {'a': 2}, {'a': 3}]
    assert frame.to_dict() == {'a': {0: 1, 1: 2}}


def test_the_rows_of_a_dataframe_become_documents_where_there_are_documents(om):
    sink = DatasetSink(om, 'results', upsert='a')
    sink.put(pandas.DataFrame({'a': [1, 2], 'b': [1, 1]}))
    sink.put(pandas.DataFrame({'a': [2], 'b': [7]}))
    assert om.datasets.metadata('results').kind == 'pandas.rawdict'
    assert rows(om, 'results') == [{'a': 1, 'b': 1}, {'a': 2, 'b': 7}]


@pytest.mark.parametrize('result', [7, 'text', [7], [{'a': 1}, 'text']])
@pytest.mark.parametrize('kind', ['documents', 'dataframes'])
def test_a_result_that_is_no_mapping_is_refused(om, kind, result):
    if kind == 'dataframes':
        om.datasets.put(pandas.DataFrame({'a': [1]}), 'results')
    with pytest.raises(DataError, match='mapping'):
        DatasetSink(om, 'results').put(result)


def test_what_cannot_be_stored_in_a_dataset_of_dataframes_is_a_data_error(om):
    om.datasets.put(pandas.DataFrame({'a': [1]}), 'results')
    with pytest.raises(DataError, match='results'):
        DatasetSink(om, 'results').put({'a': object()})


@pytest.mark.parametrize('options', [{'exactly_once': True}, {'upsert': 'a'}])
def test_dataframes_are_only_appended(om, options):
    om.datasets.put(pandas.DataFrame({'a': [1]}), 'results')
    with pytest.raises(ArgumentError, match='exactly_once'):
        DatasetSink(om, 'results', **options)


def test_a_dataset_that_is_no_collection_or_of_python_objects_is_refused(om):
    put_file(om, 'file')
    om.datasets.put({'a': 1}, 'objects')
    for refused in [lambda: DatasetSource(om, 'file'), lambda: DatasetSink(om, 'file')]:
        with pytest.raises(ArgumentError, match='file'):
            refused()
    with pytest.raises(ArgumentError, match=r'python\.data'):
        DatasetSink(om, 'objects')
    sink = DatasetSink(om, 'later')
    om.datasets.put({'a': 1}, 'later')
    with pytest.raises(ArgumentError, match=r'python\.data'):
        sink.put({'a': 2})


@pytest.mark.parametrize('adapter', [DatasetSource, DatasetSink])
def test_a_wrong_argument_is_refused_by_name(om, adapter):
    with pytest.raises(ArgumentError, match='om must'):
        adapter('omegaml', 'numbers')
    with pytest.raises(ArgumentError, match='dataset must'):
        adapter(om, None)
    with pytest.raises(TypeError, match='colour'):
        adapter(om, 'numbers', colour=1)


@pytest.mark.parametrize('exactly_once', [True, False])
def test_each_window_is_in_the_dataset_also_when_the_sink_fails_once(om, url, exactly_once):
    """With exactly_once=True once, else twice: the sink fails when it has written."""
    stream = mb.stream('orders', url=url)
    sink = DatasetSink(om, 'results', exactly_once=exactly_once)
    method, failures = 'put_once' if exactly_once else 'put', []
    write = getattr(sink, method)

    def fails_once(*args):
        write(*args)
        if not failures:
            failures.append(args)
            raise RuntimeError('after the write')

    setattr(sink, method, fails_once)
    sink.put_many = lambda results, windows: 0
    stream.append_many({'a': i} for i in range(4))
    emitter = mb.make_emitter('orders', lambda window: window.data, url=url, size=2, sink=sink)
    emitter.start()
    try:
        eventually(lambda: not stream.buffer().count())
    finally:
        emitter.stop()
    found = sorted(row['a'] for row in rows(om, 'results'))
    assert found == ([0, 1, 2, 3] if exactly_once else [0, 0, 1, 1, 2, 3])


def test_windows_come_from_one_dataset_and_go_to_another(om, url):
    om.datasets.collection('orders').insert_many([{'total': 3}])
    source, sink = DatasetSource(om, 'orders', delay=0.05), DatasetSink(om, 'totals', exactly_once=True)

    def total(window):
        return {'sum': sum(order['total'] for order in window.data)}

    emitter = mb.make_emitter('orders', total, url=url, size=2, source=source, sink=sink)
    emitter.start()
    try:
        om.datasets.collection('orders').insert_many([{'total': order} for order in (4, 5, 6)])
        eventually(lambda: om.datasets.metadata('totals') and len(rows(om, 'totals')) == 2)
    finally:
        emitter.stop()
    assert sorted(row['sum'] for row in rows(om, 'totals')) == [7, 11]  # windows may overtake each other
