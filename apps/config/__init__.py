"""The configuration of a run: the schema of its TOML file, how it is loaded, and which keys exclude each other.

Every command that runs a model reads a configuration. The package uses pydantic for the schema and takes the choices of
a key from the registries of ``layers``.
"""
