"""`python -m cogvx_fast` is the command `cogvx-fast`."""

from .cli import main

if __name__ == "__main__":
    main()
