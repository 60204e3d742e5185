-- The view over an archive's version that `nec query` and `archive.sql` see; $FILES is the version's
-- explicit file list, $COLUMNS the columns of index.json.
CREATE TEMP VIEW embeddings AS SELECT $COLUMNS FROM $FILES
