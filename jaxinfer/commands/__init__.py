"""Subcommands of the command `jaxinfer`; scripts of the same names call them too."""
