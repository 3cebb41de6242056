"""A campaign of faults in a running service while 64 callers wait for it.

service    the service to serve: a batch fails, hangs or kills its worker when the campaign says so
callers    callers that compare each vector
campaign   the faults, and how long each takes to be noticed and to be over
"""
