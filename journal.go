// The journal: a file in DATA_DIR with a record for each change that a backend has promised to remember. Here it is
// written and synced. Its form is in journalfile.go, how it is made smaller in compact.go. What a record means is not
// known here; see records.go.

package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	noRoomPause = 250 * time.Millisecond // between two tries to write
	zeroesAhead = 64 << 10               // bytes; while the file does not grow, a sync takes up to half as long
)

var errCannotStore = newError(http.StatusServiceUnavailable, "cannot_store", "cannot store")

// journal is the open journal of a backend with DATA_DIR. A nil journal stores nothing: write calls its functions at
// once, wait returns at once, and it is never full.
type journal struct {
	dir      string
	log      *slog.Logger
	disk     disk
	lock     *os.File
	live     func() int                // about how many bytes a snapshot has
	snapshot func(record func([]byte)) // gives the records that make all again that is remembered
	slack    int64                     // see compactSlack
	ahead    int                       // bytes of zeroes to write behind the records; see zeroesAhead

	syncs, errors, syncSeconds *series

	wake      chan struct{}    // has run store what is queued
	compacted chan *compaction // for run
	broken    chan error       // gets the error of a sync; then the process must end, as nobody knows what is on disk
	stopping  chan struct{}    // closed by close
	stopped   chan struct{}    // closed by run

	size   atomic.Int64 // bytes of whole records; changed by run alone
	noRoom atomic.Bool  // the last write failed

	// Of run alone.
	file   journalFile
	number uint64           // of the last commit
	dirty  bool             // there may be more in the file behind size, besides zeroes
	zeroes int64            // where those behind the records end
	held   *commit          // could not be written, and is tried again; or nil
	found  int64            // where the records end that a start found, while held is the last of them; or 0
	retry  <-chan time.Time // when that is
	spare  []byte           // of an earlier commit, for the frames of a later one
	dead   bool             // a sync failed, and run has ended

	mu   sync.Mutex // guards what is in next
	next *commit    // gets what is written; replaced by run alone
}

// commit holds the records that are written and synced together.
type commit struct {
	number uint64
	frames []byte
	last   int           // where the last of them begins
	after  []func()      // called in order once the commit is on disk
	done   chan struct{} // closed by finish once the commit is on disk or has been refused
	once   sync.Once     // closes done: what was refused is finished again when it is on disk
	stored atomic.Bool   // it is on disk
}

func newCommit(number uint64) *commit { return &commit{number: number, done: make(chan struct{})} }

// journalFile is an open file, and disk what else is done with files. Tests have others.
type journalFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
	Truncate(size int64) error
}

type disk struct {
	open   func(path string, flag int) (journalFile, error) // makes it if it is missing; flag is os.O_TRUNC or 0
	rename func(from, to string) error
	remove func(path string) error
	sync   func(dir string) error
}

var realDisk = disk{
	open: func(path string, flag int) (journalFile, error) {
		return os.OpenFile(path, os.O_RDWR|os.O_CREATE|flag, 0o600)
	},
	rename: os.Rename,
	remove: os.Remove,
	sync: func(dir string) error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Sync()
	},
}

// openJournal opens the journal in dir, which is made if it is missing, and gives its records to apply. If another
// process has it, the error names that.
func openJournal(dir string, d disk, reg *registry, log *slog.Logger, apply func(record []byte) error) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	j := &journal{
		dir: dir, log: log, disk: d, lock: lock, slack: compactSlack, ahead: zeroesAhead,
		wake: make(chan struct{}, 1), compacted: make(chan *compaction, 1), broken: make(chan error, 1),
		stopping: make(chan struct{}), stopped: make(chan struct{}),
	}
	j.register(reg)
	if j.file, err = d.open(j.path(), 0); err == nil {
		err = j.read(apply)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("%s: %w", j.path(), err)
	}
	d.remove(j.newPath()) // of a compaction that did not come to its end
	if mounts, _ := os.ReadFile("/proc/self/mountinfo"); isVolatile(string(mounts), dir) {
		log.Warn("a power cut may lose what was answered: DATA_DIR is on an overlay that does not sync", "dir", dir)
	}
	return j, nil
}

func (j *journal) register(reg *registry) {
	j.syncs = reg.counters("sidecast_journal_syncs_total", "Syncs of the journal.").with()
	j.errors = reg.counters("sidecast_journal_errors_total", "Failures to write the journal or to make it smaller.").with()
	j.syncSeconds = reg.histograms("sidecast_journal_sync_seconds", "Duration of a write to the journal and its sync in seconds.",
		requestBuckets).with()
	reg.value("sidecast_journal_bytes", "Bytes of the files in DATA_DIR.", func() (size float64) {
		files, _ := os.ReadDir(j.dir)
		for _, f := range files {
			if info, err := f.Info(); err == nil {
				size += float64(info.Size())
			}
		}
		return size
	})
	reg.value("sidecast_journal_writable", "Whether the journal takes records: 0 while there is no room.", func() float64 {
		if j.full() {
			return 0
		}
		return 1
	})
}

func (j *journal) path() string    { return filepath.Join(j.dir, "journal") }
func (j *journal) newPath() string { return j.path() + ".new" }

// lockDir takes the lock of dir, which the process has until the file is closed. That file is never renamed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		return nil, fmt.Errorf("locking %s: process %s has it: %w", dir, strings.TrimSpace(string(pid)), err)
	}
	f.Truncate(0)
	fmt.Fprintln(f, os.Getpid())
	return f, nil
}

// isVolatile reports whether a sync in dir does nothing, as on an overlay that is mounted "volatile" (podman run --rm).
// The mounts are as in proc_pid_mountinfo(5).
func isVolatile(mounts, dir string) (volatile bool) {
	if abs, err := filepath.Abs(dir); err == nil {
		dir, _ = filepath.EvalSymlinks(abs)
	}
	longest := 0
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		if len(fields) < 10 || !strings.HasPrefix(dir+"/", strings.TrimSuffix(fields[4], "/")+"/") || len(fields[4]) < longest {
			continue
		}
		options := strings.ReplaceAll(fields[len(fields)-1], "fsync=", "") // as Linux 6.18 puts it
		longest, volatile = len(fields[4]), slices.Contains(strings.Split(options, ","), "volatile")
	}
	return volatile
}

// write queues a record for the next commit; nil queues none. Once that commit is on disk, run calls the functions of
// after, which must not wait for a commit. The result is the commit to wait for.
func (j *journal) write(record []byte, after ...func()) *commit {
	if j == nil {
		for _, f := range after {
			f()
		}
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	c := j.next
	if record != nil {
		c.last = len(c.frames)
		c.frames = appendFrame(c.frames, frameMore, c.number, record)
	}
	c.after = append(c.after, after...)
	select {
	case j.wake <- struct{}{}:
	default:
	}
	return c
}

// written returns the commit after which all that was queued so far is on disk.
func (j *journal) written() *commit { return j.write(nil) }

// wait waits until the commit is on disk. An error means that it is not; it may come to be there later.
func (c *commit) wait() error {
	if c == nil {
		return nil
	}
	<-c.done
	if !c.stored.Load() {
		return errCannotStore
	}
	return nil
}

// full reports whether the last write failed. Then nothing new may be taken.
func (j *journal) full() bool { return j != nil && j.noRoom.Load() }

// run stores what is queued, tries again while there is no room, and has the file made smaller, until close, or until a
// sync fails.
func (j *journal) run() {
	defer close(j.stopped)
	compacting, compactAt := false, time.Time{} // zero, or when compaction may be tried again
	for !j.dead {
		select {
		case <-j.wake:
			runtime.Gosched() // lets others that are about to write join the commit
			if !j.full() {
				j.store()
			}
		case <-j.retry:
			j.store()
		case c := <-j.compacted:
			compacting = false
			if !j.replace(c) || j.due() { // then it would be as large again
				compactAt = time.Now().Add(compactPause)
			}
		case <-j.stopping:
			if j.store(); j.full() {
				j.log.Error("ending with changes that could not be stored")
			}
			return
		}
		if !compacting && !j.dead && time.Now().After(compactAt) && j.due() {
			compacting = true
			go j.compact(&compaction{copied: j.size.Load()}, j.number)
		}
	}
}

// due reports whether the file should be made smaller: it is much larger than what is live, or what it has of the
// forgotten may be the room that it lacks. It is not before the last commit that a start found has been written again:
// the numbers of a snapshot are above that of this commit, which would follow them.
func (j *journal) due() bool {
	size := j.size.Load()
	if size <= j.slack && !j.full() || j.found > 0 {
		return false
	}
	live := int64(j.live())
	return size > live+j.slack || j.full() && size > 2*live
}

// store stores what had no room before, and what is queued.
func (j *journal) store() {
	for again := true; again; {
		c := j.held
		again = c != nil // the next one was refused with it: nobody must write to that any more
		if c == nil {
			c = j.take()
		}
		if len(c.frames) > 0 && !j.put(c) {
			return
		}
		for _, f := range c.after {
			f()
		}
		c.stored.Store(true)
		c.finish()
		c.frames, c.after = nil, nil
	}
	if j.noRoom.Swap(false) {
		j.log.Info("the journal has room again")
	}
}

// take returns what is queued. What comes later is in another commit.
func (j *journal) take() *commit {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := j.next
	j.next = newCommit(c.number)
	if len(c.frames) > 0 {
		j.next.number += commitStep
		j.next.frames, j.spare = j.spare, nil
		c.frames[c.last] = frameLast
		seal(c.frames[c.last:])
	}
	return c
}

// put writes and syncs a commit, and reports whether it is on disk.
func (j *journal) put(c *commit) bool {
	start := time.Now()
	if err := j.append(c.frames); err != nil {
		j.cut() // or before the next write
		if !j.full() {
			j.log.Error("cannot write the journal: nothing new is taken until there is room", "err", err)
		}
		j.refuse(c)
		return false
	}
	if err := j.file.Sync(); err != nil {
		j.giveUp(c, fmt.Errorf("syncing the journal: %w", err))
		return false
	}
	j.syncs.Inc()
	j.syncSeconds.observe(time.Since(start).Seconds())
	j.size.Add(int64(len(c.frames)))
	j.number, j.held, j.found = c.number, nil, 0
	if cap(c.frames) <= maxRecord {
		j.spare = c.frames[:0]
	}
	return true
}

// append writes frames behind the records, and zeroes behind those if the file would grow anyway and has room.
func (j *journal) append(frames []byte) error {
	if j.dirty {
		if err := j.cut(); err != nil {
			return err
		}
	}
	size := j.size.Load()
	end := size + int64(len(frames))
	if end > j.zeroes {
		if _, err := j.file.WriteAt(append(frames, make([]byte, j.ahead)...), size); err == nil {
			j.zeroes = end + int64(j.ahead)
			return nil
		}
	}
	_, err := j.file.WriteAt(frames, size)
	return err
}

// cut cuts off what is behind the last whole record.
func (j *journal) cut() error {
	err := j.file.Truncate(max(j.size.Load(), j.found))
	j.dirty, j.zeroes = err != nil, 0
	return err
}

// refuse keeps a commit that could not be written, and releases those that wait for it or for the next one.
func (j *journal) refuse(c *commit) {
	j.errors.Inc()
	j.noRoom.Store(true)
	j.held, j.retry = c, time.After(noRoomPause)
	c.finish()
	j.next.finish()
}

// giveUp ends the writing for good.
func (j *journal) giveUp(c *commit, err error) {
	j.dead = true
	j.refuse(c)
	j.broken <- err
}

// finish releases those that wait.
func (c *commit) finish() { c.once.Do(func() { close(c.done) }) }

// close stores what is queued, if there is room. Then another process may open the folder.
func (j *journal) close() {
	close(j.stopping)
	<-j.stopped
	j.file.Close()
	j.lock.Close()
}
