"""The checks of a job, one module per subject; `job.check_job` calls them."""
