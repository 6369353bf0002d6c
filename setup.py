from setuptools import setup

setup(cffi_modules=["src/cellvisor/core/_native/build_native.py:ffibuilder"])
