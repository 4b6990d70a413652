"""What tests are made with: checkpoints in every layout and encoding, faults, runs of the command.

The rooms of tests/ are those of the package: tests/source/ asks about moe_ckpt/source/, and so on.
Beside them:

    kit/      helpers, importable as `kit.*` from every test; no tests in here
    oracle/   the package against ModelOpt's exports and against transformers
    project/  what is true of the repository: documentation, benchmarks, dependencies

A file holds the answers to the one question that its docstring asks. Helpers that two files need
live here, never in a test file. `@pytest.mark.slow` is for what takes more than about a second of a
CPU, or starts many processes: `make test-fast` leaves it out.
"""
