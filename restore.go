// What a start makes of the records of the journal, and the records that make all again that is live. What a record says
// is in records.go, how the journal is written in journal.go.

package main

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// restoring is a start that reads the journal.
type restoring struct {
	tasks   *TaskService
	version *VersionService
	numbers map[uint64]*task // by number
}

func newRestoring(tasks *TaskService, version *VersionService) *restoring {
	return &restoring{tasks: tasks, version: version, numbers: map[uint64]*task{}}
}

// apply applies a record.
func (r *restoring) apply(text []byte) error {
	if text[0] == recordEvent {
		return r.event(text[1:])
	}
	var rec recordFields
	if err := json.Unmarshal(text[1:], &rec); err != nil {
		return fmt.Errorf("reading a record: %w", err)
	}
	switch text[0] {
	case recordTask:
		if r.numbers[rec.Number] == nil {
			t := &task{number: rec.Number, id: rec.ID, kind: rec.Kind, title: rec.Title, params: string(rec.Params)}
			t.events, t.status = &eventLog{policy: r.tasks.policy, epoch: rec.Epoch}, taskPending
			if older := r.tasks.tasks[t.id]; older != nil { // the older one was forgotten, of which there is no record
				delete(r.numbers, older.number)
			}
			r.numbers[t.number], r.tasks.tasks[t.id] = t, t
		}
	case recordDelete:
		if t := r.numbers[rec.Number]; t != nil {
			delete(r.numbers, t.number)
			delete(r.tasks.tasks, t.id)
		}
	case recordVersion, recordMark, recordDropID, recordLatest:
		r.version.restore(text[0], rec)
	default:
		return fmt.Errorf("unknown record %q", text[0])
	}
	return nil
}

func (r *restoring) event(text []byte) error {
	var head [4]uint64
	for i := range head {
		value, size := binary.Uvarint(text)
		if size <= 0 {
			return errors.New("an event is too short")
		}
		head[i], text = value, text[size:]
	}
	t := r.numbers[head[0]]
	if t == nil || head[1] <= t.lastEvent {
		return nil
	}
	t.events.Restore(entry{n: head[1], data: string(text), keep: head[3] == 1})
	t.lastEvent, t.seq = head[1], max(t.seq, head[2])
	return nil
}

// finish completes the tasks once all has been read, and continues those that have not ended.
func (r *restoring) finish() error {
	s := r.tasks
	s.mu.Lock()
	defer s.mu.Unlock()
	tasks := slices.SortedFunc(maps.Values(r.numbers), func(a, b *task) int { return cmp.Compare(a.number, b.number) })
	var finished []*task
	for _, t := range tasks {
		if err := t.restore(); err != nil {
			return fmt.Errorf("restoring task %q: %w", t.id, err)
		}
		s.created = t.number
		if t.status.finished() {
			if time.Since(t.end) >= s.cfg.remember { // first, so that it takes no room from the others
				delete(s.tasks, t.id)
				continue
			}
			finished = append(finished, t)
		}
		s.memory.count(&t.held, t.size())
	}
	s.displaceLocked()
	slices.SortFunc(finished, func(a, b *task) int { return a.end.Compare(b.end) })
	for _, t := range finished {
		t.place = s.finished.PushBack(t)
		t.deadline = s.afterwards(t, time.Until(t.end.Add(s.cfg.remember)), s.forgetLocked)
	}
	for _, t := range tasks {
		if !t.status.finished() {
			s.resumeLocked(t)
		}
	}
	s.makeRoomLocked(0)
	s.dispatchLocked()
	r.version.restored()
	return nil
}

// resumeLocked continues a task that has not ended, or fails it if it cannot go on.
func (s *TaskService) resumeLocked(t *task) {
	switch {
	case t.kind == externalTask && t.status == taskPending: // its start was not stored
		s.outside++
		s.startLocked(t, "worker lost")
	case t.kind == externalTask:
		s.outside++
		s.watchLocked(t, "worker lost")
	case t.status == taskRunning:
		s.finishLocked(t, taskFailed, "interrupted by a restart")
	default:
		params, err := parseObject([]byte(t.params))
		if err == nil {
			t.work, err = s.makeWork(t.kind, params)
		}
		if err != nil {
			s.finishLocked(t, taskFailed, usableFailure(err.Error()))
			return
		}
		s.queue = append(s.queue, t)
	}
}

// displaceLocked makes room for all tasks by dropping the oldest progress of the largest ones. What was dropped before
// the restart is in the journal still, and must not cost finished tasks.
func (s *TaskService) displaceLocked() {
	for most := s.memory.limit; !s.memory.fits(0) && most > taskOverhead; most -= most / 8 {
		for _, t := range s.tasks {
			for t.held.bytes > most && t.events.DropOldest() {
				s.memory.count(&t.held, t.size())
			}
		}
	}
}

// restore sets the state of t by its events: the first one and the last two. The last report is one of them, unless a
// limit has dropped it.
func (t *task) restore() error {
	events := t.events.All()
	for i, e := range events {
		if i > 0 && i < len(events)-2 {
			continue
		}
		var told taskEvent[json.RawMessage]
		if err := json.Unmarshal([]byte(e.data), &told); err != nil {
			return err
		}
		switch status := taskStatus(strings.TrimPrefix(told.EventType, "task_")); status {
		case "started":
			t.status, t.start = taskRunning, told.Timestamp
		case "progress_update":
			t.progress = &taskProgress{}
			json.Unmarshal(told.Data, t.progress)
		case taskFailed:
			var failure struct{ Error string }
			json.Unmarshal(told.Data, &failure)
			t.status, t.end, t.err = status, told.Timestamp, failure.Error
		default:
			t.status, t.end = status, told.Timestamp
			if status == taskCompleted {
				t.result = e.data[len(e.data)-1-len(told.Data) : len(e.data)-1]
			}
		}
	}
	if t.status.finished() {
		t.params = ""
		t.events.Publish(t.lastEvent, t.status.ending())
	}
	state := t.taskState
	t.shown.Store(&state)
	return nil
}

// snapshot gives the records that make the tasks again, one task after the other.
func (s *TaskService) snapshot(record func([]byte)) {
	s.mu.Lock()
	tasks := slices.SortedFunc(maps.Values(s.tasks), func(a, b *task) int { return cmp.Compare(a.number, b.number) })
	s.mu.Unlock()
	for _, t := range tasks {
		s.mu.Lock()
		known, made, seq, events := s.tasks[t.id] == t, t.record(), t.seq, t.events.All()
		s.mu.Unlock()
		if !known { // forgotten since, perhaps with its events
			continue
		}
		record(made)
		for _, e := range events {
			record(encodeEvent(t.number, e.n, seq, e.keep, e.data))
		}
	}
}

// restore applies a record about versions. Nobody else uses s yet.
func (s *VersionService) restore(kind byte, rec recordFields) {
	st := s.streams[rec.ID]
	switch {
	case kind == recordLatest:
		s.latest = announcement{rec.Version, rec.Data}
		s.broadcasts++
	case kind == recordDropID:
		delete(s.streams, rec.ID)
	case kind == recordMark && st != nil:
		st.events.Received(rec.Event)
	case kind == recordVersion:
		if st == nil || st.events.epoch != rec.Epoch {
			st = &versionStream{events: &eventLog{policy: s.policy, epoch: rec.Epoch}, stored: true}
			s.streams[rec.ID] = st
		}
		e := entry{n: rec.Event, data: rec.Data, shared: rec.Shared}
		if e.shared {
			e.data = s.latest.data
		}
		st.broadcast = s.broadcasts
		if rec.Event > st.events.stats().last {
			st.events.Restore(e)
			st.version = rec.Version
		}
	}
}

// restored starts the clocks of the request IDs: none has a connection yet.
func (s *VersionService) restored() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, st := range s.streams {
		st.alone = time.Now()
		s.countLocked(id, st)
	}
}

// snapshot gives the records that make the versions again.
func (s *VersionService) snapshot(record func([]byte)) {
	var before, after [][]byte // of those that lack the last announcement to everybody, and of those that have it
	s.mu.Lock()
	for id, st := range s.streams {
		switch {
		case !st.stored:
		case st.broadcast == s.broadcasts:
			after = append(after, st.records(id)...)
		default:
			before = append(before, st.records(id)...)
		}
	}
	latest := s.latest
	s.mu.Unlock()
	if latest.version != "" {
		before = append(before, latest.record())
	}
	for _, r := range append(before, after...) {
		record(r)
	}
}
