"""MongoDB collections as sources and as a sink.

======================  ==============================================================================================
MongoSource             polls a collection of any MongoDB for documents with a higher id, or a later time
MongoReplicasetSource   follows the changes of a collection on a replica set: inserts, and, if asked, updates, deletes
MongoSink               writes the results of windows
======================  ==============================================================================================
"""

from .changes import MongoReplicasetSource
from .polling import MongoSource
from .sink import MongoSink

__all__ = ['MongoReplicasetSource', 'MongoSink', 'MongoSource']
