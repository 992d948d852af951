"""torch's own RPC test suites, run on a backend of one's choice.

The suites ship inside torch (`torch.testing._internal.distributed.rpc_utils`), written against an abstract fixture. This package
supplies the fixtures, starts the tests quickly, and tells what became of them::

    python -m tests.conformance --backend ZMQ --jobs 2
    python -m tests.conformance --backend TENSORPIPE --suite DistAutogradTest --only "nested"

==============  ====================================================================================
`suites`        which suites there are, and the test classes that torch's generator makes of them
`fixtures`      what a suite needs to know of a backend, and what happens in each rank of a test
`process`       one test in a process group of its own: started, watched, ended
`causes`        from pages of tracebacks to the one line that tells why
`exclusions`    the tests that prove nothing of a backend, each with its reason
`report`        lines, totals, JSON
`table`         JSON of two backends to a table for the docs
==============  ====================================================================================
"""
