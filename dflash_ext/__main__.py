"""`python -m dflash_ext` is `dflash-ext`."""

from .cli import main

if __name__ == "__main__":
    main()
