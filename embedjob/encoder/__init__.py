import embedjob.models  # noqa: F401 - its log levels, before transformers is imported
