"""How fast moe-ckpt is, beside what the machine and other tools can do: `python -m bench --help`.

The measuring modules return plain documents; `report` turns them into text. None of it is part of
the installed package.
"""
