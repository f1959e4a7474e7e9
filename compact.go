// Compaction: a smaller file takes the place of a journal that has grown. When that is due is in journal.go, what is
// live in restore.go.

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"time"
)

const (
	// compactSlack is how much larger than what is live a journal may get before it is made smaller.
	compactSlack = 32 << 20
	compactPause = 10 * time.Second // after a failure
	compactPart  = 1 << 20          // bytes that are written at once
	compactRest  = 512 << 10        // bytes that are copied while nothing else is written
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

// compact writes a snapshot of what is live to a new file, and after it what has been appended to the old one since
// then. A change that is made meanwhile may be in both; restore.go allows for that. The numbers of the frames begin
// after that of the last commit and grow with each compactGroup, and all frames but the last say that their commit goes
// on. So damage in the snapshot is not taken for what a crash has left, unless nothing of another group follows it.
func (j *journal) compact(c *compaction, number uint64) {
	if c.file, c.err = j.disk.open(j.newPath(), os.O_TRUNC); c.err == nil {
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
		j.copyRest(c)
	}
	j.compacted <- c
}

// copyRest copies what has been appended to the journal since c.copied.
func (j *journal) copyRest(c *compaction) {
	rest := io.NewSectionReader(j.file, c.copied, j.size.Load()-c.copied)
	n, err := io.CopyBuffer(c, rest, make([]byte, compactPart))
	c.copied, c.err = c.copied+n, err
}

// replace puts the new file in the place of the journal, and reports whether it is there. After a failure the new file
// is removed at once, as its room may be what the journal lacks.
func (j *journal) replace(c *compaction) bool {
	if c.err == nil {
		j.copyRest(c)
	}
	if c.err == nil {
		c.err = j.disk.rename(j.newPath(), j.path())
	}
	if c.err != nil {
		j.errors.Inc()
		j.log.Warn("making the journal smaller", "err", c.err)
		j.disk.remove(j.newPath())
		go c.file.Close() // frees its blocks, as below; a nil *os.File takes that, too
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
