"""Hugging Face directories, ``config.json`` and safetensors, without the package transformers.

`architecture` describes as data how a model maps onto a directory, `directory` reads and writes the files, and
`settings` the tokenizer and the generation settings beside them. The models of ``layers.models`` fill in the data, and
``layers.models.pretrained`` calls all three modules.
"""
