package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A crashDisk is a disk in memory. It crashes after a number of writes, syncs and the like. Any part of what was not
// synced is then lost, or zero.
type crashDisk struct {
	rand *rand.Rand

	mu      sync.Mutex // guards the rest
	left    int        // how many steps it still works
	room    int        // bytes that all files together may have; 0 for no limit
	copies  bool       // like btrfs, it writes nothing in place: without room it writes nothing at all
	renames int
	now     map[string]*crashFile
	durable map[string]*crashFile // the files that were there when the folder was last synced
}

type crashFile struct {
	disk         *crashDisk
	data, synced []byte
}

var errCrashed = errors.New("crashed")

func (d *crashDisk) disk() disk {
	return disk{open: d.open, rename: d.rename, remove: d.remove, sync: d.sync}
}

// step locks the disk and reports whether it still works.
func (d *crashDisk) step() bool {
	d.mu.Lock()
	d.left--
	return d.left >= 0
}

func (d *crashDisk) open(path string, flag int) (journalFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now[path] == nil || flag&os.O_TRUNC != 0 {
		d.now[path] = &crashFile{disk: d}
	}
	return d.now[path], nil
}

func (d *crashDisk) rename(from, to string) error {
	defer d.mu.Unlock()
	if !d.step() {
		return errCrashed
	}
	d.renames++
	d.now[to] = d.now[from]
	delete(d.now, from)
	return nil
}

func (d *crashDisk) remove(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.now, path)
	return nil
}

func (d *crashDisk) sync(string) error {
	defer d.mu.Unlock()
	if !d.step() {
		return errCrashed
	}
	d.durable = maps.Clone(d.now)
	return nil
}

func (f *crashFile) ReadAt(b []byte, off int64) (int, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	return bytes.NewReader(f.data).ReadAt(b, off)
}

func (f *crashFile) WriteAt(b []byte, off int64) (n int, err error) {
	defer f.disk.mu.Unlock()
	works := f.disk.step()
	used := int(off) + len(b) - len(f.data)
	for _, other := range f.disk.now {
		used += len(other.data)
	}
	if f.disk.copies && f.disk.room > 0 {
		return 0, syscall.ENOSPC
	}
	if over := used - f.disk.room; f.disk.room > 0 && over > 0 {
		b = b[:max(0, len(b)-over)]
		f.data = append(f.data[:min(len(f.data), int(off))], b...)
		return len(b), syscall.ENOSPC
	}
	if !works {
		if f.disk.left < -1 {
			return 0, errCrashed
		}
		b, err = b[:f.disk.rand.IntN(len(b)+1)], errCrashed // a write may be cut short
	}
	f.data = append(f.data, make([]byte, max(0, int(off)+len(b)-len(f.data)))...)
	return copy(f.data[off:], b), err
}

func (f *crashFile) Sync() error {
	defer f.disk.mu.Unlock()
	if !f.disk.step() {
		return errCrashed
	}
	f.synced = bytes.Clone(f.data)
	return nil
}

func (f *crashFile) Truncate(size int64) error {
	defer f.disk.mu.Unlock()
	if !f.disk.step() {
		return errCrashed
	}
	f.data = f.data[:min(size, int64(len(f.data)))]
	return nil
}

func (f *crashFile) Close() error { return nil }

// reboot makes the disk work for some more steps, with what the crash has left.
func (d *crashDisk) reboot(steps int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left = steps
	if d.rand.IntN(2) == 0 {
		d.now = d.durable
	}
	lost := 2 << d.rand.IntN(6) // one block in this many
	for _, f := range d.now {
		const block = 16
		size := len(f.synced)
		if n := len(f.data) - size; n > 0 {
			size += d.rand.IntN(n + 1)
		}
		left := make([]byte, size)
		for i := 0; i < size; i += block {
			from := f.data
			if d.rand.IntN(lost) == 0 {
				from = f.synced
			}
			copy(left[i:min(i+block, size)], from[min(i, len(from)):])
		}
		f.data, f.synced = left, bytes.Clone(left)
	}
	d.now, d.durable = maps.Clone(d.now), maps.Clone(d.now)
}

// counts is the last number of each key. The records are "key n", with an n that grows by one.
type counts map[string]int

func (c counts) apply(record []byte) error {
	var key string
	var n int
	if _, err := fmt.Sscanf(string(record), "%s %d", &key, &n); err != nil {
		return err
	}
	if c[key] != 0 && n > c[key]+1 {
		return fmt.Errorf("%s: %d follows %d", key, n, c[key])
	}
	c[key] = max(c[key], n)
	return nil
}

// openTestJournal opens the journal of a folder on a disk. It also returns what is logged.
func openTestJournal(dir string, d disk, apply func([]byte) error) (j *journal, said *bytes.Buffer, err error) {
	said = new(bytes.Buffer)
	err = unlocked(func() (err error) {
		j, err = openJournal(dir, d, newRegistry("test"), slog.New(slog.NewTextHandler(said, nil)), apply)
		return err
	})
	if err == nil {
		j.ahead, j.live = 0, func() int { return 0 } // a disk in memory is small
	}
	return j, said, err
}

// ignored takes a record of a journal that has nothing to be restored.
func ignored([]byte) error { return nil }

// journalTest runs a story in a bubble, with an empty journal on a disk with this much room, or without a limit if 0.
func journalTest(t *testing.T, room int, story func(t *testing.T, d *crashDisk, j *journal)) {
	t.Helper()
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &crashDisk{rand: rand.New(rand.NewPCG(1, 1)), left: 1 << 30, room: room, now: map[string]*crashFile{}}
		j, _, err := openTestJournal(dir, d.disk(), ignored)
		must(t, err)
		story(t, d, j)
	})
}

// unlocked calls open until no other process has the folder. A process that another test is starting has copies of all
// our descriptors until its exec.
func unlocked(open func() error) (err error) {
	for range 1 << 16 {
		if err = open(); !errors.Is(err, syscall.EWOULDBLOCK) {
			break
		}
		runtime.Gosched()
	}
	return err
}

// After a crash or a power cut, even during a compaction, every record that was waited for is there, and none that was
// not written.
func TestJournalCrashes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	seeds := tries("SIDECAST_SEEDS", 200)
	crashes, renames := 0, 0
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) {
			d := &crashDisk{rand: rand.New(rand.NewPCG(seed, 1)), now: map[string]*crashFile{}, durable: map[string]*crashFile{}}
			written, stored := counts{}, counts{}
			for range 6 {
				d.reboot(d.rand.IntN(8 << d.rand.IntN(5)))
				read := counts{}
				j, _, err := openTestJournal(dir, d.disk(), read.apply)
				if errors.Is(err, errCrashed) {
					crashes++
					continue
				}
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				for key, n := range stored {
					if read[key] < n || read[key] > written[key] {
						t.Fatalf("seed %d: %s is %d, want %d to %d", seed, key, read[key], n, written[key])
					}
				}
				var mu sync.Mutex // guards read, which is what is live, written and stored
				j.slack, j.ahead = int64(d.rand.IntN(3000)), d.rand.IntN(500)
				j.snapshot = func(record func([]byte)) {
					mu.Lock()
					live := maps.Clone(read)
					mu.Unlock()
					for key, n := range live {
						record(fmt.Appendf(nil, "%s %d", key, n))
					}
				}
				go j.run()
				var writers sync.WaitGroup
				for w := range 3 {
					key := fmt.Sprint("key", w)
					writers.Go(func() {
						for range 30 {
							mu.Lock()
							read[key]++
							n := read[key]
							written[key] = n
							c := j.write(fmt.Appendf(nil, "%s %d %s", key, n, strings.Repeat("x", n%50)))
							mu.Unlock()
							if n%7 < 5 {
								continue // so that several are under way at the same time
							}
							if c.wait() != nil {
								return
							}
							mu.Lock()
							stored[key] = n
							mu.Unlock()
						}
					})
				}
				writers.Wait()
				j.close()
				synctest.Wait() // a compaction may be under way
				if d.left < 0 {
					crashes++
				}
			}
			renames += d.renames
		})
		if t.Failed() {
			return
		}
	}
	if crashes < int(seeds) || renames < int(seeds)/10 {
		t.Errorf("%d crashes and %d renames in %d runs", crashes, renames, seeds)
	}
}

// A compaction that fails because the disk is full frees the room that it took. Then the journal, which had no room
// either, works again.
func TestJournalCompactionWithoutRoom(t *testing.T) {
	journalTest(t, compactPart+2500, func(t *testing.T, d *crashDisk, j *journal) {
		full := make(chan error, 1)
		var held *commit
		j.slack = 500
		j.snapshot = func(record func([]byte)) {
			for n := range 2 * compactPart / 1000 {
				record(make([]byte, 1000))
				if n == compactPart/1000+1 {
					held = j.write(make([]byte, 1500), func() {
						if held.wait() == nil {
							t.Error("a commit that was refused counts as stored before its records are shown")
						}
					})
					full <- held.wait()
				}
			}
		}
		go j.run()
		must(t, j.write(make([]byte, 600)).wait())
		j.write(make([]byte, 600)).wait() // starts the compaction, and may itself find no room
		if err := <-full; err != errCannotStore || !j.full() {
			t.Errorf("got %v, want no room", err)
		}
		d.mu.Lock()
		if size := len(d.now[j.path()].data); int64(size) != j.size.Load() {
			t.Errorf("a write that failed has left %d bytes, want it cut back to %d", size, j.size.Load())
		}
		d.mu.Unlock()
		time.Sleep(2 * noRoomPause)
		if held.wait() != nil || j.full() || d.now[j.path()+".new"] != nil {
			t.Errorf("got %v and %d files, want it to go on", held.wait(), len(d.now))
		}
		j.close()
	})
}

// badFile is a file that can only be read up to good.
type badFile struct {
	*crashFile
	good int64
}

func (f badFile) ReadAt(b []byte, off int64) (int, error) {
	if off+int64(len(b)) <= f.good {
		return f.crashFile.ReadAt(b, off)
	}
	n, _ := f.crashFile.ReadAt(b[:max(0, f.good-off)], off)
	return n, syscall.EIO
}

// A part that cannot be read is not taken for the end of the file, and nothing is written over it.
func TestJournalUnreadable(t *testing.T) {
	t.Parallel()
	file, _, _ := journalOf(t, 10)
	for _, good := range []int{0, 10, len(file) / 2, len(file) - 1} {
		d := &crashDisk{left: 1 << 30, now: map[string]*crashFile{}}
		bad := badFile{&crashFile{disk: d, data: bytes.Clone(file)}, int64(good)}
		disk := d.disk()
		disk.open = func(string, int) (journalFile, error) { return bad, nil }
		_, _, err := openTestJournal(t.TempDir(), disk, ignored)
		if !errors.Is(err, syscall.EIO) || !bytes.Equal(bad.data, file) {
			t.Errorf("unreadable from %d on: got %v, and %d bytes of %d", good, err, len(bad.data), len(file))
		}
	}
}

// onceFile is a file whose parts can be read once.
type onceFile struct {
	*crashFile
	next int64
}

func (f *onceFile) ReadAt(b []byte, off int64) (int, error) {
	if off < f.next {
		return 0, syscall.EIO
	}
	n, err := f.crashFile.ReadAt(b, off)
	f.next = off + int64(n)
	return n, err
}

// A start that has read the last commit can write it again, also if the disk fails meanwhile.
func TestJournalReadOnce(t *testing.T) {
	t.Parallel()
	file, _, begins := journalOf(t, 10)
	d := &crashDisk{left: 1 << 30, now: map[string]*crashFile{}}
	disk := d.disk()
	disk.open = func(string, int) (journalFile, error) { // the last commit lacks its end
		return &onceFile{crashFile: &crashFile{disk: d, data: file[:begins[5]]}}, nil
	}
	_, _, err := openTestJournal(t.TempDir(), disk, ignored)
	must(t, err)
}

// When a sync fails, nobody waits any longer, and broken has the error.
func TestJournalSyncFails(t *testing.T) {
	journalTest(t, 0, func(t *testing.T, d *crashDisk, j *journal) {
		go j.run()
		d.left = 1 // the write
		for range 2 {
			if err := j.write([]byte("x")).wait(); err != errCannotStore {
				t.Errorf("got %v", err)
			}
		}
		if err := receive(t, j.broken); !errors.Is(err, errCrashed) {
			t.Errorf("got %v", err)
		}
		j.close()
	})
}

// A start that has no room to write the last commit again, or a header, goes on without. Nothing is lost by that, and all
// is written when there is room.
func TestJournalStartsWithoutRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := &crashDisk{left: 1 << 30, room: 1, copies: true, now: map[string]*crashFile{}}
		room := func(n int) {
			d.mu.Lock()
			d.room = n
			d.mu.Unlock()
			time.Sleep(2 * noRoomPause)
		}
		start := func(want ...string) *journal {
			t.Helper()
			var read []string
			j, _, err := openTestJournal(dir, d.disk(), func(record []byte) error {
				read = append(read, string(record))
				return nil
			})
			must(t, err)
			if !slices.Equal(read, want) {
				t.Errorf("got %q, want %q", read, want)
			}
			j.snapshot = func(func([]byte)) { t.Error("made smaller although its last commit is not there yet") }
			go j.run()
			return j
		}
		j := start()
		held := j.write([]byte("one"))
		if err := held.wait(); err != errCannotStore {
			t.Errorf("got %v, want no room", err)
		}
		room(0)
		must(t, held.wait())
		must(t, j.write([]byte("two")).wait())
		j.close()
		room(1)
		for range 2 { // the first of these loses nothing to the second
			j = start("one", "two")
			if err := j.write([]byte("three")).wait(); err != errCannotStore {
				t.Errorf("got %v, want no room", err)
			}
			time.Sleep(2 * noRoomPause)
			j.close()
		}
		j = start("one", "two")
		room(0)
		must(t, j.write([]byte("four")).wait())
		j.close()
		if j.found > 0 {
			t.Error("with room again it is never made smaller")
		}
		start("one", "two", "four").close()
	})
}

// If the disk is full of forgotten records, the journal makes room by itself.
func TestJournalCompactsForRoom(t *testing.T) {
	journalTest(t, 10_000, func(t *testing.T, _ *crashDisk, j *journal) {
		j.live = func() int { return 1000 }
		j.snapshot = func(record func([]byte)) { record(make([]byte, 700)) }
		go j.run()
		for range 9 {
			must(t, j.write(make([]byte, 1000)).wait())
		}
		if err := j.write(make([]byte, 1000)).wait(); err != errCannotStore {
			t.Errorf("got %v, want no room", err)
		}
		time.Sleep(2 * noRoomPause)
		if err := j.write(make([]byte, 1000)).wait(); err != nil || j.full() {
			t.Errorf("got %v, want room", err)
		}
		j.close()
	})
}

// A snapshot that turns out larger than live said is not made again at once.
func TestJournalRestsAfterCompaction(t *testing.T) {
	journalTest(t, 0, func(t *testing.T, _ *crashDisk, j *journal) {
		snapshots := 0
		j.slack = 500
		j.snapshot = func(record func([]byte)) {
			snapshots++
			record(make([]byte, 1000))
		}
		go j.run()
		for range 50 {
			must(t, j.write(make([]byte, 100)).wait())
			time.Sleep(compactPause / 10)
		}
		if snapshots < 4 || snapshots > 6 {
			t.Errorf("got %d snapshots in 5 times compactPause, want 4 to 6", snapshots)
		}
		j.close()
	})
}

// Zeroes are written behind the records, so that the file does not grow with each commit. They are no damage, and no
// reason to take nothing when there is room for records alone.
func TestJournalWritesAhead(t *testing.T) {
	const head, frame = int64(len(journalHeader)), int64(frameHead + 10)
	journalTest(t, int(head+11*frame), func(t *testing.T, d *crashDisk, j *journal) {
		for commit, want := range []int64{6, 6, 6, 6, 6, 6, 11, 11, 11, 11, 11} {
			j.ahead = 5 * int(frame)
			j.write([]byte("ten bytes."))
			j.store()
			if got := int64(len(d.now[j.path()].data)); got != head+want*frame || j.full() {
				t.Errorf("after commit %d: got %d bytes, full %v, want room for %d records", commit, got, j.full(), want)
			}
			if commit%2 == 0 {
				continue
			}
			records := 0
			j.file.Close()
			j.lock.Close()
			count := func([]byte) error { records++; return nil }
			again, said, err := openTestJournal(j.dir, d.disk(), count)
			if err != nil || records != commit+1 || said.Len() > 0 {
				t.Fatalf("after commit %d: got %v, %d records, and the log says %q", commit, err, records, said)
			}
			j = again
		}
		j.lock.Close()
	})
}

func TestJournalWritesAheadAfterCompaction(t *testing.T) {
	journalTest(t, 0, func(t *testing.T, d *crashDisk, j *journal) {
		j.ahead = 1000
		j.snapshot = func(record func([]byte)) { record([]byte("live")) }
		j.write([]byte("one"))
		j.store()
		j.compact(&compaction{copied: j.size.Load()}, j.number)
		if !j.replace(<-j.compacted) {
			t.Error("not replaced")
		}
		j.write([]byte("two"))
		j.store()
		if got, want := len(d.now[j.path()].data), int(j.size.Load())+1000; got != want {
			t.Errorf("got %d bytes, want %d", got, want)
		}
		j.lock.Close()
	})
}

// slowFile takes a second for each sync.
type slowFile struct{ *crashFile }

func (f slowFile) Sync() error {
	time.Sleep(time.Second)
	return f.crashFile.Sync()
}

// A writer without a record that arrives during a sync needs no sync of its own.
func TestJournalWaitsBehindAnother(t *testing.T) {
	journalTest(t, 0, func(t *testing.T, _ *crashDisk, j *journal) {
		j.file = slowFile{j.file.(*crashFile)}
		go j.run()
		began := time.Now()
		var waiting sync.WaitGroup
		for n, record := range [][]byte{[]byte("record"), nil} {
			waiting.Go(func() {
				time.Sleep(time.Duration(n) * 500 * time.Millisecond)
				err := j.write(record).wait()
				if took := time.Since(began); err != nil || took != time.Second {
					t.Errorf("writer %d: got %v after %v, want nil after a second", n, err, took)
				}
			})
		}
		waiting.Wait()
		j.close()
	})
}

// journalOf returns the bytes of a journal with n records, in commits of one to three, the records, and where each begins.
func journalOf(t *testing.T, n int) (file []byte, records []string, begins []int) {
	d := &crashDisk{left: 1 << 30, now: map[string]*crashFile{}}
	j, _, err := openTestJournal(t.TempDir(), d.disk(), ignored)
	must(t, err)
	for i := range n {
		records = append(records, fmt.Sprint("record ", i))
		begins = append(begins, int(j.size.Load())+len(j.next.frames))
		j.write([]byte(records[i]))
		if slices.Contains([]int{0, 2, 5}, i%6) || i == n-1 {
			if j.store(); j.full() {
				t.Fatal("not stored")
			}
		}
	}
	j.lock.Close()
	return d.now[j.path()].data, records, begins
}

// readJournal returns the records of a file, what the log says, and the error.
func readJournal(dir string, file []byte) (records []string, said string, err error) {
	d := &crashDisk{left: 1 << 30, now: map[string]*crashFile{}}
	d.now[filepath.Join(dir, "journal")] = &crashFile{disk: d, data: bytes.Clone(file)}
	j, log, err := openTestJournal(dir, d.disk(), func(record []byte) error {
		records = append(records, string(record))
		return nil
	})
	if err == nil {
		j.lock.Close()
	}
	return records, log.String(), err
}

// A journal that is cut off anywhere gives the records before the cut, and logs how much it drops. One with a spoilt
// byte is refused, and the error says where, unless the byte is in the last commit: a crash may have left it like that.
func TestJournalDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, records, begins := journalOf(t, 100)
	whole := func(end int) int { // how many whole records there are before
		n, found := slices.BinarySearch(append(begins, len(file)), end)
		if !found {
			n--
		}
		return n
	}
	step := 1
	if underRace { // .ci/run tries them all without it
		step = 16
	}
	for end := 0; end < len(file); end += step {
		got, said, err := readJournal(dir, file[:end])
		n := max(0, whole(end))
		if err != nil || !slices.Equal(got, records[:n]) {
			t.Fatalf("cut off at %d: got %d records and %v, want %d", end, len(got), err, n)
		}
		lost := end
		if end >= len(journalHeader) {
			lost = len(bytes.TrimRight(file[append(begins, len(file))[n]:end], "\x00")) // zeroes may be what is written ahead
		}
		if (lost == 0) != (said == "") || lost > 0 && !strings.Contains(said, fmt.Sprintf("bytes=%d\n", lost)) {
			t.Fatalf("cut off at %d: the log says %q", end, said)
		}
	}
	lastCommit := begins[99] // 99 is in a commit of its own
	for i := 0; i < len(file); i += step {
		spoilt := bytes.Clone(file)
		spoilt[i] ^= byte(1 + i%255)
		got, _, err := readJournal(dir, spoilt)
		switch {
		case i < len(journalHeader):
			if err == nil {
				t.Fatalf("byte %d: a damaged header was accepted", i)
			}
		case i < lastCommit:
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("journal: damaged at offset %d:", begins[whole(i)])) {
				t.Fatalf("byte %d of %d: got %d records and %v", i, len(file), len(got), err)
			}
		case err != nil || len(got) != 99:
			t.Fatalf("byte %d of the last record: got %d records and %v, want 99", i, len(got), err)
		}
	}
	if _, _, err := readJournal(dir, []byte("sidecast journal 2\n")); err == nil {
		t.Error("a newer version was accepted")
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(journalHeader), true)
	frame := appendFrame([]byte(journalHeader), frameLast, commitStep, encodeEvent(1, 2, 3, true, `{"event_type":"task_started"}`))
	f.Add(frame, false)
	f.Fuzz(func(t *testing.T, file []byte, seal bool) {
		if seal { // a good checksum lets the fuzzer get further
			file = appendFrame([]byte(journalHeader), frameLast, commitStep, file)
		}
		d := &crashDisk{left: 1 << 30, now: map[string]*crashFile{"journal": {data: file}}}
		d.now["journal"].disk = d
		api := newAPI(t, "")
		r := newRestoring(api.tasks, api.version)
		j := &journal{disk: d.disk(), file: d.now["journal"], log: slog.New(slog.DiscardHandler), broken: make(chan error, 1)}
		j.register(newRegistry("test"))
		if j.read(r.apply) == nil {
			r.finish()
		}
	})
}

func TestJournalVolatile(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	const root = "22 1 0:20 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w,volatile\n"
	data := "30 22 8:1 / " + dir + " rw - ext4 /dev/sda1 rw\n"
	for mounts, want := range map[string]bool{
		"":   false,
		root: true,
		strings.Replace(root, ",volatile", ",fsync=volatile,uuid=on", 1): true,
		root + data: false, // a volume
		data + root: false,
		"22 1 8:1 / / rw - ext4 /dev/root rw\n31 22 0:21 / " + dir + "else rw - overlay overlay rw,volatile\n": false,
	} {
		if got := isVolatile(mounts, dir); got != want {
			t.Errorf("%s: got %v, want %v", mounts, got, want)
		}
	}
}
