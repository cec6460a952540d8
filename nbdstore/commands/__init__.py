"""The commands of the command line, one module per group; `nbdstore.cli` puts them together.

A command reads its arguments, asks a `VolumeService`, and prints: it knows neither whether a
server holds the pool nor how the store works. Only ``serve`` and ``check`` reach below that seam.
"""
