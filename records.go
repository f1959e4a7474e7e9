// What the records of the journal say. Who writes them is in tasks.go and version.go, how they are written in journal.go,
// and what a start makes of them in restore.go.

package main

import (
	"encoding/binary"
	"encoding/json"
)

// The first byte of a record is its kind. The rest is JSON, but for the events of tasks, of which there are many. After
// a compaction a change may be in the file twice, so applying a record again must change nothing.
const (
	recordEvent   = 'e' // the task's number, its own number, the task's seq, whether it is kept, and the data
	recordTask    = 't' // a task is made
	recordDelete  = 'd' // a task is deleted
	recordVersion = 'v' // an event for one request_id
	recordMark    = 'm' // a request_id has received the events up to this one
	recordDropID  = 'f' // a request_id is forgotten
	recordLatest  = 'l' // an announcement to everybody
)

// recordFields are the members of all records in JSON. Each kind has some of them.
type recordFields struct {
	Number  uint64          `json:"number,omitempty"` // of a task
	ID      string          `json:"id,omitempty"`     // of a task, or a request_id
	Epoch   string          `json:"epoch,omitempty"`
	Kind    string          `json:"kind,omitempty"`
	Title   string          `json:"title,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Event   uint64          `json:"event,omitempty"` // its number
	Version string          `json:"version,omitempty"`
	Data    string          `json:"data,omitempty"`
	Shared  bool            `json:"shared,omitempty"`
}

func encodeRecord(kind byte, r recordFields) []byte { return append([]byte{kind}, marshal(r)...) }

func encodeEvent(number, n, seq uint64, keep bool, data string) []byte {
	kept := uint64(0)
	if keep {
		kept = 1
	}
	b := append(make([]byte, 0, 1+4*binary.MaxVarintLen64+len(data)), recordEvent)
	for _, field := range []uint64{number, n, seq, kept} {
		b = binary.AppendUvarint(b, field)
	}
	return append(b, data...)
}
