from embedjob.models.quiet import hush_imports

# Before any module here, or of `encoder`, imports transformers.
hush_imports()
