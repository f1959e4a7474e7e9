// The form of the journal's file, and how a start reads and checks it. What a record means is not known here; see
// records.go. How records are written is in journal.go.

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// The file begins with journalHeader, which has the version of the format. Records follow, each in a frame:
//
//	1 byte   frameMore, or frameLast at the end of a commit
//	4 bytes  CRC-32C of all the others
//	4 bytes  length of the record
//	8 bytes  number of the commit
//	         the record
//
// A commit is what one write and one sync put on disk. None is begun before the one before has been synced, so a crash
// spoils only the end of the last one. Their numbers are commitStep apart; those between are for the frames of a
// snapshot. UTF-8 has no byte that begins a frame, which spares cutTail many checksums.
const (
	journalHeader = "sidecast journal 1\n"
	frameMore     = 0xF5
	frameLast     = 0xF6
	frameHead     = 1 + 4 + 4 + 8
	commitStep    = 1 << 20

	maxRecord = 1 << 20 // bytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func appendFrame(b []byte, kind byte, number uint64, record []byte) []byte {
	start := len(b)
	b = append(b, kind, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(record)))
	b = binary.LittleEndian.AppendUint64(b, number)
	b = append(b, record...)
	seal(b[start:])
	return b
}

// seal sets the checksum of a frame.
func seal(frame []byte) { binary.LittleEndian.PutUint32(frame[1:], checksum(frame)) }

func checksum(frame []byte) uint32 {
	return crc32.Update(crc32.Checksum(frame[:1], castagnoli), castagnoli, frame[5:])
}

// frameReader reads frames from any place in a file.
type frameReader struct {
	file io.ReaderAt
	buf  []byte // the bytes of the file at base
	base int64
	err  error // of reading; the end of the file is none
}

// view returns n bytes at off, or nil if the file ends before.
func (f *frameReader) view(off int64, n int) []byte {
	if off < f.base || off+int64(n) > f.base+int64(len(f.buf)) {
		f.buf = append(f.buf[:0], make([]byte, max(n, 64<<10))...)
		read, err := f.file.ReadAt(f.buf, off)
		if err != nil && err != io.EOF {
			f.err = err
		}
		f.buf, f.base = f.buf[:read], off
	}
	if off+int64(n) > f.base+int64(len(f.buf)) {
		return nil
	}
	return f.buf[off-f.base:][:n]
}

// frame returns the frame at off, or nil if there is no good one. It is valid until the next call.
func (f *frameReader) frame(off int64) []byte {
	head := f.view(off, frameHead)
	if head == nil || head[0] != frameMore && head[0] != frameLast {
		return nil
	}
	n := binary.LittleEndian.Uint32(head[5:])
	if n == 0 || n > maxRecord {
		return nil
	}
	frame := f.view(off, frameHead+int(n))
	if frame == nil || checksum(frame) != binary.LittleEndian.Uint32(frame[1:]) {
		return nil
	}
	return frame
}

func commitOf(frame []byte) uint64 { return binary.LittleEndian.Uint64(frame[9:]) }

// read gives the records of the file to apply, and cuts off what a crash has left at the end. It is an error if
// anything else is not good.
func (j *journal) read(apply func(record []byte) error) error {
	f := &frameReader{file: j.file}
	if err := j.readHeader(f); err != nil {
		return err
	}
	off := int64(len(journalHeader))
	commit := []byte(journalHeader) // the last one, or the header if there is none
	last := 0                       // where in it its last frame begins
	for frame := f.frame(off); frame != nil; frame = f.frame(off) {
		if commitOf(frame) != j.number {
			j.number, commit = commitOf(frame), commit[:0]
		}
		if err := apply(frame[frameHead:]); err != nil {
			return fmt.Errorf("offset %d: %w", off, err)
		}
		last, commit = len(commit), append(commit, frame...)
		off += int64(len(frame))
	}
	ended := j.number == 0 || commit[last] == frameLast
	j.size.Store(off)
	j.next = newCommit(j.number/commitStep*commitStep + commitStep) // the last frame may be one of a snapshot
	if err := j.cutTail(f, ended); err != nil {
		return err
	}
	if !ended {
		commit[last] = frameLast
		seal(commit[last:])
	}
	if err := j.disk.sync(j.dir); err != nil {
		return err
	}
	// The last commit, or else the header, is written again: it may never have been synced, or its sync failed and the
	// page cache shows what the disk does not have. Those before it were synced. Without room, which some file systems
	// need to write anything, run tries again.
	c := newCommit(j.number)
	c.frames, j.found = commit, off
	j.size.Store(off - int64(len(commit)))
	if j.put(c); j.dead {
		return <-j.broken
	}
	return nil
}

// readHeader checks the header. It may be missing if the file is new, or if a crash has left only a part of it.
func (j *journal) readHeader(f *frameReader) error {
	header := f.view(0, len(journalHeader))
	size := len(f.buf) // of the file, if it has no more than that
	isHeader := bytes.HasPrefix(header, []byte("sidecast journal ")) && bytes.HasSuffix(header, []byte("\n"))
	switch {
	case f.err != nil:
		return f.err
	case string(header) == journalHeader:
		return nil
	case isHeader || size > len(journalHeader):
		return errors.New("not a journal, or that of a newer version")
	}
	if size > 0 {
		j.log.Warn("beginning a new journal: a crash has left a part of its header", "file", j.path(), "bytes", size)
	}
	return nil
}

// cutTail cuts off what is behind the good records, unless it is all zeroes, if a crash can have left it. That is so if
// every good frame in it is of the last commit, or, if that has its end, of the next one. A start that completes a
// commit and crashes leaves frames of the same commit behind its end. A good frame of a later commit proves that those
// before it were synced, and so that the file has been damaged since.
func (j *journal) cutTail(f *frameReader, ended bool) error {
	begin := j.size.Load()
	end, torn := begin, begin
	mayBeLeft := func(commit uint64) bool { return commit == j.number || ended && commit == j.next.number }
	for ; f.view(end, 1) != nil; end++ {
		if f.view(end, 1)[0] != 0 {
			torn = end + 1
		}
		if frame := f.frame(end); frame != nil && !mayBeLeft(commitOf(frame)) {
			return fmt.Errorf("damaged at offset %d: there are good records behind", begin)
		}
	}
	if f.err != nil || torn == begin {
		j.zeroes = end
		return f.err
	}
	j.log.Warn("cutting off what a crash has left of the last change", "file", j.path(), "offset", begin, "bytes", torn-begin)
	j.cut() // or before the next write
	return nil
}
