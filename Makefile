# Everything happens in .venv of this checkout; `make help` lists the targets.
PY := .venv/bin/python
C_PARTS := $(filter-out %/_native.c,$(wildcard core/_native/*.[ch] core/_native/*.cdef core/_native/build_native.py))
EXTENSION := core/_native/_native.abi3.so
# After `make test` "slow" is what is left.
LAB_TESTS := lab or slow
FAST := tests/lint tests/unit tests/contract tests/native

.PHONY: help demo test test-fast test-lab lab bench soak lint native clean
help:         ; @sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)  ## this list
demo: native  ; @$(PY) -m tests.lab.demo                                 ## boot Debian with every device in its own process
test: lint    ; $(PY) -m pytest -m "not slow"                            ## set up, check and run the tests, Linux boots included
test-fast: lint ; $(PY) -m pytest -q -m "not slow and not lab" $(FAST)   ## the tests that boot no Linux
test-lab: native ; $(PY) -m pytest -m "$(LAB_TESTS)" tests/lab tests/native  ## every test in the nested lab, and the long storm
lab: native   ; @$(PY) -m tests.lab.shell                                ## a shell in the nested lab
bench: native ; @$(PY) -m tests.bench                                    ## measure what the design has budgets for
soak: native  ; CELLVISOR_SOAK_SECONDS=600 $(PY) -m pytest -q tests/native/test_soak.py     ## use a VM for 10 minutes; nothing may grow
lint: native  ; .venv/bin/ruff check . && .venv/bin/mypy                 ## ruff and mypy --strict
# Bytecode too: where PYTHONDONTWRITEBYTECODE is set, each start of a process would compile 100 files again.
native: .venv/ready $(EXTENSION) ; @$(PY) -m compileall -q core devices controlplane ctl  ## set up .venv, rebuild the C extension if it changed
clean:        ; rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info $(EXTENSION) core/_native/_native.c  ## all but the lab's cache

.venv/ready: pyproject.toml setup.py .ci/setup ; @.ci/setup
$(EXTENSION): $(C_PARTS) | .venv/ready ; $(PY) -W ignore setup.py -q build_ext --inplace --force && touch $@
