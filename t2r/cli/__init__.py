"""The `t2r` command. Whatever is slow to import is imported by the command that needs it, so that `-h` is quick."""
