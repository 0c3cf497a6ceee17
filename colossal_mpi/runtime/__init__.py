"""The life of a rank as a process: start-up checks, the launcher, signals, and the end of a job.

Importing ``colossal_mpi`` installs the guards of this package before anything else. The commands of ``apps`` use the
launcher. The package imports nothing of ``colossal_mpi`` but the errors.
"""
