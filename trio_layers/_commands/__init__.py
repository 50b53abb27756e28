"""The commands of the command line, and the parts that they share.

`_cli` imports the modules of the command that it runs, and no others.
"""
