"""The pool: the one parent of the model workers, and the broker between them and the HTTP workers.

One ordinary process with one loop (`server`). It imports neither torch nor gevent and never waits for anything but its
selector. `supervisor` owns the processes, `broker` the jobs, `journal` what each job has produced so far.
"""
