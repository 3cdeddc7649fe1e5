"""`python -m selfsup_fastai.cli` is `selfsup`."""

from selfsup_fastai.cli import main

main()
