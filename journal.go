// The journal: a file in DATA_DIR with a record for each change that a backend has promised to remember. Here it is
// written, synced, checked and made smaller. What a record means is not known here; see restore.go.

package main

import (
	"bufio"
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
	noRoomPause = 250 * time.Millisecond // between two tries
	// compactSlack is by how much the file may be larger than what is live before it is made smaller.
	compactSlack = 32 << 20
	compactPause = 10 * time.Second // after a try that failed
	compactPart  = 1 << 20          // bytes that are written at once
	compactRest  = 1 << 20          // bytes that are copied while nothing else is written
)

var errCannotStore = newError(http.StatusServiceUnavailable, "cannot_store", "cannot store")

// journal is the open file. All methods work for a nil journal, too, which forgets: that of a backend without DATA_DIR.
type journal struct {
	dir  string
	log  *slog.Logger
	disk disk
	lock *os.File
	// live returns about how many bytes what is remembered takes, and snapshot gives records that make it all again.
	live     func() int
	snapshot func(record func([]byte))
	slack    int64 // see compactSlack

	file      journalFile // of the writer goroutine, like what follows
	number    uint64      // of the last commit
	dirty     bool        // there may be more behind what is good
	compacted chan *compaction
	compactAt time.Time     // not before
	broken    chan error    // a sync failed: what is on disk is not known any more
	stopping  chan struct{} // closed by close
	stopped   chan struct{} // closed by run

	syncs, errors, syncSeconds *series

	size   atomic.Int64 // bytes that are good; only the writer goroutine changes it
	noRoom atomic.Bool

	mu    sync.Mutex // guards next and spare
	next  *commit    // what is written next
	spare []byte     // for frames
	wake  chan struct{}
}

// commit is the records that are written and synced at once.
type commit struct {
	number uint64
	frames []byte
	last   int      // where the last frame begins
	then   []func() // called in order when the commit is on disk
	done   chan struct{}
	stored atomic.Bool
}

func newCommit(number uint64) *commit { return &commit{number: number, done: make(chan struct{})} }

// journalFile is an open file, and disk what else is done with files: seams for tests.
type journalFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
	Truncate(size int64) error
}

type disk struct {
	open   func(path string) (journalFile, error)
	rename func(from, to string) error
	sync   func(dir string) error
}

var realDisk = disk{
	open:   func(path string) (journalFile, error) { return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) },
	rename: os.Rename,
	sync: func(dir string) error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Sync()
	},
}

// openJournal opens the journal in dir, which it makes if it is missing, and gives its records to apply. The lock is
// that of the process: another one is told who has it.
func openJournal(dir string, d disk, reg *registry, log *slog.Logger, apply func(record []byte) error) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	j := &journal{
		dir: dir, log: log, disk: d, lock: lock, slack: compactSlack,
		compacted: make(chan *compaction, 1), broken: make(chan error, 1), wake: make(chan struct{}, 1),
		stopping: make(chan struct{}), stopped: make(chan struct{}),
	}
	if j.file, err = d.open(j.path()); err == nil {
		err = j.read(apply)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("%s: %w", j.path(), err)
	}
	os.Remove(j.path() + ".new") // of a compaction that was cut off
	if mounts, _ := os.ReadFile("/proc/self/mountinfo"); isVolatile(string(mounts), dir) {
		log.Warn("a power cut may lose what was answered: DATA_DIR is on an overlay that does not sync", "dir", dir)
	}
	j.syncs = reg.counters("sidecast_journal_syncs_total", "Syncs of the journal.").with()
	j.errors = reg.counters("sidecast_journal_errors_total", "Failures to write the journal or to make it smaller.").with()
	j.syncSeconds = reg.histograms("sidecast_journal_sync_seconds", "Duration of a write to the journal and its sync in seconds.",
		requestBuckets()).with()
	one := func(read func() float64) func() map[string]float64 {
		return func() map[string]float64 { return map[string]float64{"": read()} }
	}
	reg.gauge("sidecast_journal_bytes", "Bytes of the files in DATA_DIR.", one(func() float64 {
		size := 0.0
		files, _ := os.ReadDir(dir)
		for _, f := range files {
			if info, err := f.Info(); err == nil {
				size += float64(info.Size())
			}
		}
		return size
	}))
	reg.gauge("sidecast_journal_writable", "Whether the journal takes records: 0 while there is no room.", one(func() float64 {
		if j.noRoom.Load() {
			return 0
		}
		return 1
	}))
	return j, nil
}

func (j *journal) path() string { return filepath.Join(j.dir, "journal") }

// lockDir makes dir this process's own until it ends. The lock is on a file that is never renamed.
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

// isVolatile reports whether a sync in dir does nothing, as on an overlay that is mounted so (podman run --rm). The
// mounts are as in proc_pid_mountinfo(5).
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
		longest, volatile = len(fields[4]), slices.Contains(strings.Split(fields[len(fields)-1], ","), "volatile")
	}
	return volatile
}

// write queues a record, or none. then, if it is not nil, is called when that and all before it are on disk, without a
// lock of the journal. It returns what to wait for.
func (j *journal) write(record []byte, then func()) *commit {
	if j == nil {
		if then != nil {
			then()
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
	if then != nil {
		c.then = append(c.then, then)
	}
	j.hurry()
	return c
}

// written returns what to wait for until all that was written is on disk.
func (j *journal) written() *commit { return j.write(nil, nil) }

// hurry has run write what is queued.
func (j *journal) hurry() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// wait waits until the commit is on disk. If there is no room it returns errCannotStore; the commit is stored later.
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

// failed gets the error after which it is not known what is on disk.
func (j *journal) failed() <-chan error {
	if j == nil {
		return nil
	}
	return j.broken
}

// full reports whether there is no room. Then nothing new is to be taken.
func (j *journal) full() bool { return j != nil && j.noRoom.Load() }

// run writes what is queued, until close.
func (j *journal) run() {
	defer close(j.stopped)
	for compacting := false; ; {
		select {
		case <-j.wake:
			runtime.Gosched() // others that are about to write come along
			if !j.store() {
				return
			}
		case c := <-j.compacted:
			compacting = false
			if !j.replace(c) {
				return
			}
		case <-j.stopping:
			j.store()
			return
		}
		size := j.size.Load()
		if !compacting && size > j.slack && size > int64(j.live())+j.slack && time.Now().After(j.compactAt) {
			compacting = true
			go j.compact(j.file, size, j.number+1)
		}
	}
}

// store puts what is queued on disk, however often it must try. It returns false if the journal is broken, or closed
// meanwhile.
func (j *journal) store() bool {
	j.mu.Lock()
	c := j.next
	if len(c.frames) == 0 {
		j.next = newCommit(c.number)
	} else {
		j.next = newCommit(c.number + commitStep)
		j.next.frames, j.spare = j.spare, nil
	}
	j.mu.Unlock()
	if len(c.frames) > 0 {
		c.frames[c.last] = frameLast
		seal(c.frames[c.last:])
		start := time.Now()
		for err := j.append(c.frames); err != nil; err = j.append(c.frames) {
			j.refuse(c, err)
			select {
			case <-time.After(noRoomPause):
			case <-j.stopping:
				j.log.Error("ending with changes that could not be stored")
				return false
			}
			start = time.Now()
		}
		if err := j.file.Sync(); err != nil {
			j.broken <- fmt.Errorf("syncing the journal: %w", err)
			return false
		}
		j.syncs.Inc()
		j.syncSeconds.observe(time.Since(start).Seconds())
		j.size.Add(int64(len(c.frames)))
		j.number = c.number
	}
	j.mu.Lock()
	refused := j.next.finished()
	if cap(c.frames) <= maxRecord {
		j.spare = c.frames[:0]
	}
	j.mu.Unlock()
	if refused { // who wrote to it since would be refused, too
		j.hurry()
	} else if j.noRoom.Swap(false) {
		j.log.Info("the journal has room again")
	}
	c.stored.Store(true)
	for _, then := range c.then {
		then()
	}
	c.finish()
	c.frames, c.then = nil, nil
	return true
}

// append writes frames behind what is good. If that fails a part of them may be there.
func (j *journal) append(frames []byte) error {
	if err := j.clean(); err != nil {
		return err
	}
	_, err := j.file.WriteAt(frames, j.size.Load())
	if err != nil {
		j.dirty = true
		j.clean() // or the next time
	}
	return err
}

// clean cuts the file back to what is good.
func (j *journal) clean() error {
	if !j.dirty {
		return nil
	}
	err := j.file.Truncate(j.size.Load())
	j.dirty = err != nil
	return err
}

// refuse tells those that wait for c, or for what is queued behind it, that there is no room.
func (j *journal) refuse(c *commit, err error) {
	j.errors.Inc()
	if !j.noRoom.Swap(true) {
		j.log.Error("cannot write the journal: nothing new is taken until there is room", "err", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	c.finish()
	j.next.finish()
}

// finish lets go those that wait.
func (c *commit) finish() {
	if !c.finished() {
		close(c.done)
	}
}

func (c *commit) finished() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// compaction is a smaller file that is to take the journal's place.
type compaction struct {
	file   journalFile
	size   int64
	copied int64 // of the old file: what is before is in the new one
	err    error
}

// Write appends a part, and syncs it: a sync of much at once would hold up those of the journal.
func (c *compaction) Write(b []byte) (n int, err error) {
	if n, err = c.file.WriteAt(b, c.size); err == nil {
		err = c.file.Sync()
	}
	c.size += int64(n)
	return n, err
}

// copy copies what the old file has up to end.
func (c *compaction) copy(old journalFile, end int64) {
	if c.err != nil {
		return
	}
	var n int64
	n, c.err = io.Copy(io.NewOffsetWriter(c.file, c.size), io.NewSectionReader(old, c.copied, end-c.copied))
	c.size, c.copied = c.size+n, c.copied+n
}

// compact writes what is live to a new file, and behind it what is written to the old one meanwhile. That may be in
// both parts; who reads it minds. Every record of the first part but the last says that its commit goes on, and commits
// follow that are not the next: so it is damage if one of them is not good.
func (j *journal) compact(old journalFile, from int64, number uint64) {
	c := &compaction{copied: from}
	if c.file, c.err = j.disk.open(j.path() + ".new"); c.err == nil {
		c.err = c.file.Truncate(0)
	}
	if c.err == nil {
		w := bufio.NewWriterSize(c, compactPart)
		frame := []byte(journalHeader)
		j.snapshot(func(record []byte) {
			w.Write(frame)
			frame = appendFrame(frame[:0], frameMore, number+uint64(c.size/compactPart), record)
		})
		if frame[0] == frameMore {
			frame[0] = frameLast
			seal(frame)
		}
		w.Write(frame)
		c.err = w.Flush()
	}
	for end := j.size.Load(); c.err == nil && end-c.copied > compactRest; end = j.size.Load() {
		c.copy(old, end)
	}
	if c.err == nil {
		c.err = c.file.Sync()
	}
	j.compacted <- c
}

// replace puts the new file in the journal's place. It returns false if nobody knows which is there then.
func (j *journal) replace(c *compaction) bool {
	c.copy(j.file, j.size.Load())
	if c.err == nil {
		c.err = c.file.Sync()
	}
	if c.err == nil {
		c.err = j.disk.rename(j.path()+".new", j.path())
	}
	if c.err != nil {
		j.errors.Inc()
		j.log.Warn("making the journal smaller", "err", c.err)
		j.compactAt = time.Now().Add(compactPause)
		os.Remove(j.path() + ".new")
		if c.file != nil {
			c.file.Close()
		}
		return true
	}
	if err := j.disk.sync(j.dir); err != nil {
		j.broken <- fmt.Errorf("syncing the folder of the journal: %w", err)
		return false
	}
	go j.file.Close() // frees its blocks, which may take long
	j.log.Info("the journal is smaller", "before", j.size.Load(), "after", c.size)
	j.file, j.dirty = c.file, false
	j.size.Store(c.size)
	return true
}

// close stores what is queued, if there is room, and gives the folder to others.
func (j *journal) close() {
	if j == nil {
		return
	}
	close(j.stopping)
	<-j.stopped
	j.file.Close()
	j.lock.Close()
}
