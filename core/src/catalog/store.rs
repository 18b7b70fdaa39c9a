//! The catalogue on disk, so that a restart costs stat calls and no header is read twice.
//!
//! SQLite in WAL mode. The file is a cache of what scans found: whatever is wrong with it, it is set aside and a scan makes
//! a new one.

mod record;

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params};

use self::record::{Interner, decode, encode};
use super::model::Model;
use super::snapshot::Catalogue;
use crate::ids::ContentId;

/// The steps from one schema to the next; the database's `user_version` says how many were taken.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE entry (path BLOB PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE digest (file_id TEXT PRIMARY KEY, content_id TEXT NOT NULL) WITHOUT ROWID;
"];

/// Version of the records in `entry`. Records of another version are dropped: a scan finds the entries again.
const RECORD_VERSION: i64 = 3;

/// A store that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// SQLite refused.
    #[error("the catalogue's database {} failed: {source}; remove it to start anew", path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// Its folder cannot be made, or a corrupt one cannot be set aside.
    #[error("the catalogue's database {} cannot be made: {source}", path.display())]
    Io {
        /// The database.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A newer hotset wrote it.
    #[error("the catalogue's database {} has schema {found}, and this hotset knows {known}: use a newer hotset or another file", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// What is known.
        known: i64,
    },
}

impl StoreError {
    /// Whether the file is no whole database, so that another has to take its place.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Sqlite { source, .. } if is_corrupt(source))
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
    /// What was written last, by path: only what differs is written again.
    written: HashMap<Arc<Path>, Arc<Model>>,
    /// Where a corrupt predecessor was moved to.
    set_aside: Option<PathBuf>,
}

impl Store {
    /// Opens the store, making it where there is none. A corrupt one is moved to `<name>.corrupt` and a new one made.
    ///
    /// # Errors
    /// That it cannot be made, or comes from a newer hotset.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| StoreError::Io {
                path: path.to_path_buf(),
                source,
            })?;
        }
        match Self::open_once(path) {
            Err(error) if error.is_corrupt() => Self::anew(path, &error),
            opened => opened,
        }
    }

    /// Opens the store as [`open`](Self::open) does, and gives the catalogue as it was last saved. What is corrupt beyond what
    /// opening looks at shows here, and is set aside as well.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`load`](Self::load).
    pub fn open_loaded(path: &Path) -> Result<(Self, Catalogue), StoreError> {
        let mut store = Self::open(path)?;
        match store.load() {
            Err(error) if error.is_corrupt() => {
                drop(store);
                Ok((Self::anew(path, &error)?, Catalogue::new(1, Vec::new())))
            }
            loaded => Ok((store, loaded?)),
        }
    }

    /// Moves a corrupt database to `<name>.corrupt`, and makes a new one in its place.
    ///
    /// # Errors
    /// That it cannot be moved, or a new one not be made.
    pub fn anew(path: &Path, why: &StoreError) -> Result<Self, StoreError> {
        let aside = set_aside(path).map_err(|source| StoreError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        tracing::warn!(error = %why, aside = %aside.display(), "the catalogue's database was corrupt and set aside");
        let mut store = Self::open_once(path)?;
        store.set_aside = Some(aside);
        Ok(store)
    }

    fn open_once(path: &Path) -> Result<Self, StoreError> {
        let sqlite = |source| StoreError::Sqlite {
            path: path.to_path_buf(),
            source,
        };
        let connection = Connection::open(path).map_err(sqlite)?;
        connection
            .busy_timeout(std::time::Duration::from_secs(5))
            .map_err(sqlite)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(sqlite)?;
        // A crash of the machine may lose the last scan, never the file.
        connection
            .pragma_update(None, "synchronous", "NORMAL")
            .map_err(sqlite)?;
        let mut store = Self {
            connection,
            path: path.to_path_buf(),
            written: HashMap::new(),
            set_aside: None,
        };
        store.migrate()?;
        Ok(store)
    }

    fn sqlite(&self) -> impl Fn(rusqlite::Error) -> StoreError + use<> {
        let path = self.path.clone();
        move |source| StoreError::Sqlite {
            path: path.clone(),
            source,
        }
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let sqlite = self.sqlite();
        let known = MIGRATIONS.len() as i64;
        let found: i64 = self
            .connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(&sqlite)?;
        if found > known {
            return Err(StoreError::Newer {
                path: self.path.clone(),
                found,
                known,
            });
        }
        for (step, sql) in (1_i64..)
            .zip(MIGRATIONS)
            .skip(usize::try_from(found).unwrap_or(0))
        {
            let transaction = self.connection.transaction().map_err(&sqlite)?;
            transaction.execute_batch(sql).map_err(&sqlite)?;
            transaction
                .pragma_update(None, "user_version", step)
                .map_err(&sqlite)?;
            transaction.commit().map_err(&sqlite)?;
        }
        Ok(())
    }

    /// Where a corrupt predecessor was moved to when this store was opened.
    #[must_use]
    pub fn set_aside(&self) -> Option<&Path> {
        self.set_aside.as_deref()
    }

    /// The catalogue as it was last saved, to be handed to a scan as the previous one. Records that cannot be read are left
    /// out; the scan finds their entries again.
    ///
    /// # Errors
    /// What SQLite said.
    pub fn load(&mut self) -> Result<Catalogue, StoreError> {
        let sqlite = self.sqlite();
        let mut interner = Interner::default();
        let mut models: Vec<Arc<Model>> = Vec::new();
        let mut names = HashSet::new();
        {
            let mut statement = self
                .connection
                .prepare("SELECT record FROM entry")
                .map_err(&sqlite)?;
            let mut rows = statement.query([]).map_err(&sqlite)?;
            while let Some(row) = rows.next().map_err(&sqlite)? {
                let record = row.get_ref(0).map_err(&sqlite)?;
                let model = record
                    .as_blob()
                    .ok()
                    .and_then(|bytes| decode(bytes, &mut interner));
                if let Some(model) = model
                    && names.insert(model.name.clone())
                {
                    models.push(Arc::new(model));
                }
            }
        }
        self.written = models
            .iter()
            .map(|model| (model.path.clone(), Arc::clone(model)))
            .collect();
        Ok(Catalogue::new(1, models))
    }

    /// Saves a catalogue: what is new or different is written, what is gone removed, in one transaction.
    ///
    /// # Errors
    /// What SQLite said; the store is then as it was.
    pub fn save(&mut self, catalogue: &Catalogue) -> Result<(), StoreError> {
        let sqlite = self.sqlite();
        let transaction = self.connection.transaction().map_err(&sqlite)?;
        let mut written = HashMap::with_capacity(catalogue.len());
        {
            let mut put = transaction
                .prepare("INSERT OR REPLACE INTO entry (path, record) VALUES (?1, ?2)")
                .map_err(&sqlite)?;
            for model in catalogue.models() {
                let same = self
                    .written
                    .get(&model.path)
                    .is_some_and(|known| Arc::ptr_eq(known, model) || known == model);
                if !same && let Some(record) = encode(model) {
                    put.execute(params![model.path.as_os_str().as_bytes(), record])
                        .map_err(&sqlite)?;
                }
                written.insert(model.path.clone(), Arc::clone(model));
            }
            let mut remove = transaction
                .prepare("DELETE FROM entry WHERE path = ?1")
                .map_err(&sqlite)?;
            for path in self.written.keys().filter(|p| !written.contains_key(*p)) {
                remove
                    .execute(params![path.as_os_str().as_bytes()])
                    .map_err(&sqlite)?;
            }
        }
        transaction.commit().map_err(&sqlite)?;
        self.written = written;
        Ok(())
    }

    /// Remembers the digest of the bytes that a file content id stands for.
    ///
    /// # Errors
    /// What SQLite said.
    pub fn remember_digest(&self, file: ContentId, content: ContentId) -> Result<(), StoreError> {
        self.connection
            .execute(
                "INSERT OR REPLACE INTO digest (file_id, content_id) VALUES (?1, ?2)",
                params![file.to_string(), content.to_string()],
            )
            .map(drop)
            .map_err(self.sqlite())
    }

    /// The digest of the bytes that a file content id stands for, where it was made before.
    ///
    /// # Errors
    /// What SQLite said.
    pub fn digest(&self, file: ContentId) -> Result<Option<ContentId>, StoreError> {
        let text: Option<String> = self
            .connection
            .query_row(
                "SELECT content_id FROM digest WHERE file_id = ?1",
                params![file.to_string()],
                |row| row.get(0),
            )
            .optional()
            .map_err(self.sqlite())?;
        Ok(text.and_then(|text| text.parse().ok()))
    }
}

fn is_corrupt(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(
        error.sqlite_error_code(),
        Some(DatabaseCorrupt | NotADatabase)
    ) || matches!(error, rusqlite::Error::SqliteFailure(_, Some(text)) if text.contains("already exists"))
}

/// Moves a database and what SQLite keeps beside it out of the way.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let beside = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = beside(".corrupt");
    std::fs::rename(path, &aside)?;
    for suffix in ["-wal", "-shm"] {
        match std::fs::remove_file(beside(suffix)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::super::scan::{ScanOptions, scan};
    use super::super::test_utils::{put, safetensors};
    use super::*;
    use std::ffi::OsStr;

    fn scanned(root: &Path, previous: Option<&Catalogue>) -> (Catalogue, u64) {
        let options = ScanOptions::new(vec![root.to_path_buf()]);
        let report = scan(&options, previous, &|_| {});
        (report.catalogue, report.inspected)
    }

    #[test]
    fn a_restart_reads_no_header() {
        let root = tempfile::tempdir().unwrap();
        let file = safetensors(
            &[("model.diffusion_model.x", &[4]), ("vae.x", &[4])],
            &[("a", "b")],
        );
        put(root.path(), "a.safetensors", &file);
        put(root.path(), "broken.safetensors", "x");
        std::fs::write(
            root.path().join(OsStr::from_bytes(b"z\xff.safetensors")),
            &file,
        )
        .unwrap();
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("deep/catalogue.sqlite");
        let (catalogue, inspected) = scanned(root.path(), None);
        assert_eq!(inspected, 3);
        Store::open(&path).unwrap().save(&catalogue).unwrap();

        let mut store = Store::open(&path).unwrap();
        let loaded = store.load().unwrap();
        let all = |c: &Catalogue| c.models().map(|m| (**m).clone()).collect::<Vec<_>>();
        assert!(all(&loaded) == all(&catalogue));
        let (again, inspected) = scanned(root.path(), Some(&loaded));
        assert_eq!(inspected, 0);
        std::fs::remove_file(root.path().join("a.safetensors")).unwrap();
        let (less, _) = scanned(root.path(), Some(&again));
        store.save(&less).unwrap();
        assert_eq!(Store::open(&path).unwrap().load().unwrap().len(), 2);
    }

    #[test]
    fn a_corrupt_file_is_set_aside() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("catalogue.sqlite");
        std::fs::write(
            &path,
            "this is no database at all, and long enough to be looked at".repeat(100),
        )
        .unwrap();
        let mut store = Store::open(&path).unwrap();
        assert!(store.set_aside().unwrap().exists());
        assert!(store.load().unwrap().is_empty());
    }

    /// Opening looks at the first page only.
    #[test]
    fn what_is_corrupt_inside_is_set_aside_when_it_is_loaded() {
        let root = tempfile::tempdir().unwrap();
        for n in 0..200 {
            let file = safetensors(&[("model.diffusion_model.x", &[4])], &[("a", "b")]);
            put(root.path(), &format!("model-{n}.safetensors"), &file);
        }
        let (catalogue, _) = scanned(root.path(), None);
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("catalogue.sqlite");
        Store::open(&path).unwrap().save(&catalogue).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() > 3 * 4096, "{}", bytes.len());
        bytes[4096..].fill(0xee);
        std::fs::write(&path, bytes).unwrap();
        assert!(Store::open(&path).unwrap().load().is_err());

        let (mut store, loaded) = Store::open_loaded(&path).unwrap();
        assert!(loaded.is_empty());
        assert!(store.set_aside().unwrap().exists());
        store.save(&catalogue).unwrap();
        drop(store);
        let (_, loaded) = Store::open_loaded(&path).unwrap();
        assert_eq!(loaded.len(), 200);
    }

    #[test]
    fn a_newer_schema_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("catalogue.sqlite");
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(matches!(
            Store::open(&path),
            Err(StoreError::Newer { found: 99, .. })
        ));
    }

    #[test]
    fn damaged_records_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        put(
            root.path(),
            "a.safetensors",
            safetensors(&[("w", &[4])], &[]),
        );
        let (catalogue, _) = scanned(root.path(), None);
        let model = catalogue.models().next().unwrap();
        let record = encode(model).unwrap();
        for len in 0..record.len() {
            assert!(decode(&record[..len], &mut Interner::default()).is_none());
        }
        let state = tempfile::tempdir().unwrap();
        let store = Store::open(&state.path().join("c.sqlite")).unwrap();
        let id = model.components[0].content_id;
        assert_eq!(store.digest(id).unwrap(), None);
        store
            .remember_digest(id, ContentId::Blake3([7; 32]))
            .unwrap();
        assert_eq!(store.digest(id).unwrap(), Some(ContentId::Blake3([7; 32])));
    }
}
