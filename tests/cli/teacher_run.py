"""`distill-sampler teacher-logprobs` with small chunks, as a process that a test can kill."""

import sys

from distill_sampler.cli import app, teacher_job

if __name__ == "__main__":
    teacher_job.CHUNK_ROWS = 4
    app(["teacher-logprobs", *sys.argv[1:]])
