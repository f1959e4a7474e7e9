// Compaction: a smaller file takes the place of a journal that has grown. When that is due is in journal.go, what is
// live in restore.go.

package main

import (
	"bufio"
	"fmt"
	"io"
	"time"
)

const (
	// compactSlack is how much larger than what is live a journal may get before it is made smaller.
	compactSlack = 32 << 20
	compactPause = 10 * time.Second // after a failure
	compactPart  = 1 << 20          // bytes that are written at once
	compactRest  = 1 << 20          // bytes that are copied while nothing else is written
	compactGroup = 4 << 10          // bytes of a snapshot that have one number, and so are a commit
)

// compaction is a smaller file that is to take the journal's place.
type compaction struct {
	file   journalFile
	size   int64
	copied int64 // of the old file: all before is in the new one
	err    error
}

// Write appends a part and syncs it: one large sync at the end would delay those of the journal.
func (c *compaction) Write(b []byte) (n int, err error) {
	if n, err = c.file.WriteAt(b, c.size); err == nil {
		err = c.file.Sync()
	}
	c.size += int64(n)
	return n, err
}

// copy copies what the old file has up to end.
func (c *compaction) copy(old journalFile, end int64) {
	var n int64
	n, c.err = io.Copy(io.NewOffsetWriter(c.file, c.size), io.NewSectionReader(old, c.copied, end-c.copied))
	c.size, c.copied = c.size+n, c.copied+n
}

// compact writes a snapshot of what is live to a new file, and after it what has been appended to the old one since
// from. A change that is made meanwhile may be in both; restore.go allows for that. The numbers of the frames grow with
// each compactGroup, and all frames but the last say that their commit goes on. So damage in the snapshot is not taken
// for what a crash has left, unless nothing of another group follows it.
func (j *journal) compact(old journalFile, from int64, number uint64) {
	c := &compaction{copied: from}
	if c.file, c.err = j.disk.open(j.path() + ".new"); c.err == nil {
		c.err = c.file.Truncate(0)
	}
	if c.err == nil {
		w := bufio.NewWriterSize(c, compactPart)
		frame, written := []byte(journalHeader), uint64(0)
		j.snapshot(func(record []byte) {
			w.Write(frame)
			written += uint64(len(frame))
			frame = appendFrame(frame[:0], frameMore, number+min(1+written/compactGroup, commitStep-1), record)
		})
		if frame[0] == frameMore {
			frame[0] = frameLast
			seal(frame)
		}
		w.Write(frame)
		c.err = w.Flush()
	}
	for c.err == nil && j.size.Load()-c.copied > compactRest {
		c.copy(old, j.size.Load())
	}
	if c.err == nil {
		c.err = c.file.Sync()
	}
	if c.err != nil {
		j.abandon(c) // now, as the room may be what the journal lacks
	}
	j.compacted <- c
}

// abandon removes the new file after a failure.
func (j *journal) abandon(c *compaction) {
	j.errors.Inc()
	j.log.Warn("making the journal smaller", "err", c.err)
	j.disk.remove(j.path() + ".new")
	c.file.Close() // a nil *os.File takes that, too
}

// replace puts the new file in the place of the journal, and reports whether it is there.
func (j *journal) replace(c *compaction) bool {
	if c.err != nil {
		return false
	}
	c.copy(j.file, j.size.Load())
	if c.err == nil {
		c.err = c.file.Sync()
	}
	if c.err == nil {
		c.err = j.disk.rename(j.path()+".new", j.path())
	}
	if c.err != nil {
		j.abandon(c)
		return false
	}
	if err := j.disk.sync(j.dir); err != nil { // either file may be there after a crash; no commit is at fault
		j.giveUp(newCommit(0), fmt.Errorf("syncing the folder of the journal: %w", err))
		return false
	}
	go j.file.Close() // frees its blocks, which may take long
	j.log.Info("the journal is smaller", "before", j.size.Load(), "after", c.size)
	j.file, j.dirty, j.zeroes = c.file, false, 0
	j.size.Store(c.size)
	return true
}
