"""The runtime checker of annotations: beartype, taking an int where a float is asked for, as type checkers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
