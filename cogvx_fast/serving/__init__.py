"""A video server over the engine, which knows nothing of it.

`api` is HTTP, `store` the jobs, `files` the videos, `scheduler` who is next, `worker` a process that owns one pipeline,
`supervisor` what starts those; `ray_app` is all of it under Ray. Store and files are all that a server and its workers
share.
"""
