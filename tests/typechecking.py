"""How annotations of the library are checked while tests run."""

from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int is a float.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
