"""The conformance client put to work: on nbdstore, on other servers, and on broken ones.

tests/conformance knows nothing of nbdstore; what joins the two lives here.
"""
