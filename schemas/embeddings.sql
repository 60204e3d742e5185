-- The view over an archive's version that `nec query` and `archive.sql` see; $FILES is the version's explicit file list.
CREATE VIEW embeddings AS SELECT * FROM $FILES
