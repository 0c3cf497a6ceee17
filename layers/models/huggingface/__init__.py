"""Directories of Hugging Face's transformers: ``config.json`` and safetensors, read and written without transformers.

A mapping for each architecture, as data, says where our weights stand in theirs; reading and writing are its two
directions. `colossal_mpi.layers.models` makes models of directories, and the other way round.

Modules
-------
axes : where the elements of one weight stand
architecture : what such data consist of
gpt2, llama, bert, vit : the data
source, sink : a directory to read, a directory to write
weights : all weights of a model, in both directions
"""
