# Everything happens in .venv of this checkout; `make help` lists the targets.
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast test-lab lab bench lint native clean
help:      ; @sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)
