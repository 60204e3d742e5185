-- The view over one version of an archive: the columns of index.json, from the version's explicit list of files.
CREATE TEMP VIEW embeddings AS SELECT $COLUMNS FROM $FILES
