"""OpenAI's files and batches: a file of requests in, a file of responses out, whenever the service has nothing to do.

store    files and batches on disk, in a folder that all workers share
lines    the lines of an input file: their form and their order
runner   runs batches, below the priority of requests, and resumes them after a restart
routes   the HTTP routes
batches  all of it in one worker, if the operator has chosen a folder
"""
