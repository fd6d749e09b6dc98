"""Datasets of omega|ml as a source and as a sink.

What is used of omega|ml is ``om.datasets``: its ``collection``, ``metadata`` and ``put``. The package itself is not
imported, since whoever has an ``om`` has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bson.errors import BSONError
from pymongo.collection import Collection

from minibatch.abc import WindowCommit
from minibatch.contrib.mongodb import MongoSink, MongoSource
from minibatch.errors import ArgumentError, DataError

DOCUMENTS = 'pandas.rawdict'  # what omega|ml calls a dataset that is a plain collection of documents
ROWS = 'pandas.dfrows'  # ... that is of DataFrames


class DatasetSource(MongoSource):
    """A source that polls a dataset of omega|ml for new documents, or rows of DataFrames.

    It is a `minibatch.contrib.mongodb.MongoSource` of the dataset's collection, with its options and guarantees: no
    document is lost or comes twice, by a crash or restart, but one that becomes visible later than ``overlap`` allows.

    A message is the document as it is in the collection: of a DataFrame it has the columns of a row, and what omega|ml
    adds (``_id``, ``_om#rowid``, ``_idx#0_0`` ...); of a dataset of Python objects, ``data``. A dataset that is not
    there is made, as a collection of documents.

    Args:
        om: the omega|ml instance.
        dataset: the name of the dataset.
        options: those of `minibatch.contrib.mongodb.MongoSource`: ``size``, ``idcol``, ``delay``, ``overlap`` ...

    Raises:
        ArgumentError: naming the argument that is wrong; or if the dataset has no collection, as files and arrays.

    Example:
        >>> import minibatch as mb, omegaml as om    # doctest: +SKIP
        >>> @mb.streaming('orders', size=100, source=DatasetSource(om, 'orders'))    # doctest: +SKIP
        ... def process(window):
        ...     print(sum(order['total'] for order in window.data))
    """

    def __init__(self, om: Any, dataset: str, **options: Any) -> None:
        self.om, self.dataset = om, dataset
        collection, kind = _look_up(om, dataset)
        super().__init__(collection, **options)
        if kind is None:
            om.datasets.put(collection, dataset)


class DatasetSink:
    """A sink that appends the result of each window to a dataset of omega|ml.

    What the function returns may be a mapping, a list of mappings, or a DataFrame:

    - *A dataset of documents* (``om.datasets.put(collection, name)``) is given each mapping, or row, as one document,
      by a `minibatch.contrib.mongodb.MongoSink`.
    - *A dataset of DataFrames* is given the rows, by ``om.datasets.put(dataframe, name, append=True)``.
    - *A dataset that is not there* is made: of DataFrames, if a DataFrame is the first result and neither option is
      used, else of documents.

    Other kinds of datasets are refused. ``om.datasets.get(name)`` is a DataFrame of all results.

    A window is tried again after a crash between sink and commit, or an error, and what was written is then in the
    dataset a second time. **exactly_once=True** and **upsert=**, for datasets of documents, are those of `MongoSink`,
    and show each result once.

    Args:
        om: the omega|ml instance.
        dataset: the name of the dataset.
        exactly_once: whether a window that is tried again shows its result once.
        upsert: the field, or the list of fields, by which documents are replaced.

    Raises:
        ArgumentError: naming the argument that is wrong; or if the dataset has no collection, as files and arrays.

    Example:
        >>> import minibatch as mb, omegaml as om    # doctest: +SKIP
        >>> @mb.streaming('orders', size=100, sink=DatasetSink(om, 'totals', exactly_once=True))    # doctest: +SKIP
        ... def total(window):
        ...     return {'total': sum(order['total'] for order in window.data)}
    """

    def __init__(
        self, om: Any, dataset: str, exactly_once: bool = False, upsert: str | Sequence[str] | None = None
    ) -> None:
        self.om, self.dataset = om, dataset
        self._only_documents = exactly_once or upsert is not None
        self._collection, kind = _look_up(om, dataset)
        self._check_kind(kind)
        self._sink = MongoSink(self._collection, exactly_once, upsert)
        if exactly_once:
            self.put_once = self._put_once  # only an instance that has it is an ExactlyOnceSink

    def put(self, messages: Any) -> None:
        """Append the result of one window.

        Raises:
            ArgumentError: if the dataset has become one of another kind.
            DataError: naming the type, if it is neither a mapping, nor an iterable of mappings, nor a DataFrame.
            Exception: what omega|ml and pymongo raise.
        """
        if self._takes_frames(_is_frame(messages)):
            self._put_frame(messages)
        else:
            self._sink.put(_documents(messages))

    def put_many(self, results: Sequence[Any], windows: Sequence[WindowCommit]) -> int:
        """Append the results of many windows; 0 if that must be one by one. See `minibatch.abc.BulkSink`."""
        if self._takes_frames(any(map(_is_frame, results))):
            return 0
        return self._sink.put_many([_documents(result) for result in results], windows)

    def _put_once(self, messages: Any, window: WindowCommit) -> None:
        """Append the result of one window so that it is there once."""
        self._takes_frames(False)
        self._sink.put_once(_documents(messages), window)

    def _takes_frames(self, given: bool) -> bool:
        """Whether the dataset is one of DataFrames, or becomes one as a DataFrame is given; else it is made."""
        meta = self.om.datasets.metadata(self.dataset)
        if meta is not None:
            self._check_kind(meta.kind)
            return bool(meta.kind == ROWS)
        if given and not self._only_documents:
            return True
        self.om.datasets.put(self._collection, self.dataset)
        return False

    def _check_kind(self, kind: str | None) -> None:
        if kind == ROWS and self._only_documents:
            raise ArgumentError(
                f'dataset {self.dataset!r} is one of DataFrames ({kind}), to which rows are only appended: '
                f'leave out exactly_once and upsert, or take a dataset of documents'
            )
        if kind not in (None, DOCUMENTS, ROWS):
            raise ArgumentError(f'dataset {self.dataset!r} is of kind {kind}; take one of documents or DataFrames')

    def _put_frame(self, result: Any) -> None:
        frame = result if _is_frame(result) else _frame_of(result)
        if len(frame):
            try:
                self.om.datasets.put(frame, self.dataset, append=True)
            except BSONError as exc:
                raise DataError(f'dataset {self.dataset!r} cannot take the result: {exc}') from exc


def _look_up(om: Any, dataset: Any) -> tuple[Collection[Any], str | None]:
    """The collection of a dataset, also of one that is not there yet, and its kind."""
    if not hasattr(om, 'datasets'):
        raise ArgumentError(f'om must be an omega|ml instance, which has datasets; {type(om).__name__} has not')
    if not isinstance(dataset, str) or not dataset:
        raise ArgumentError(f'dataset must be the name of a dataset, not {dataset!r}')
    meta = om.datasets.metadata(dataset)
    if meta is not None and not meta.collection:
        raise ArgumentError(f'dataset {dataset!r} is of kind {meta.kind}, which has no collection of documents')
    collection = om.datasets.collection(dataset)  # omega|ml wraps it
    return collection.database[collection.name], None if meta is None else meta.kind


def _is_frame(result: Any) -> bool:
    return hasattr(result, 'columns') and hasattr(result, 'to_dict')


def _documents(result: Any) -> Any:
    return result.to_dict('records') if _is_frame(result) else result


def _frame_of(result: Any) -> Any:
    from pandas import DataFrame

    rows = [result] if isinstance(result, Mapping) else result
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes)):
        raise DataError(f'DatasetSink takes mappings or a DataFrame, not {type(rows).__name__}')
    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f'DatasetSink takes a list of mappings; item {i} is of type {type(row).__name__}')
    return DataFrame(rows)
