"""How Sphinx builds the documentation: make docs."""

import importlib.metadata
import os

# autodoc looks at every attribute, also at those that ask a server, and none is to be started.
os.environ['MINIBATCH_MONGO_URL'] = 'mongomock://localhost/docs'

project = 'minibatch'
release = importlib.metadata.version('minibatch')
extensions = ['sphinx.ext.napoleon', 'sphinx.ext.autodoc']
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'minibatch {release}'

# A docstring inherited from mongoengine says nothing about minibatch.
autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
