// The ordered, numbered events of one task or one request_id, and how far each follower of them is. Connections and
// tokens are not known here; follower.go delivers the events.

package main

import (
	"cmp"
	"context"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
)

// logPolicy is what the event logs of one service have in common.
type logPolicy struct {
	event string        // name of the events
	epoch func() string // makes the epoch of a log; "" for events without ID

	// A connection that names no event of a log starts at its first event if replay is set, and otherwise at the first
	// one that no browser is known to have.
	replay bool
	// limit bounds the events that such a connection would get, and separately those before them, which are kept for
	// browsers that resume by ID. 0 means no limit. Beyond it the oldest event without keep is dropped, and counted in
	// dropped if nobody was given it.
	limit   int
	dropped *series
}

// eventLog holds the events of one task or one request_id, numbered from 1 without a gap.
//
// Lock order: a service's, a follower's, then mu.
type eventLog struct {
	policy *logPolicy
	epoch  string // first part of the IDs, different for each log; "" for events without ID

	mu      sync.Mutex // guards the rest, and the cursors
	entries []entry    // in the order of their numbers
	bytes   int        // of the heap for their data, without what is shared
	last    uint64     // number of the newest event
	visible uint64     // events up to this number are on disk, and may be sent
	start   uint64     // a fresh connection gets the events after this number
	given   uint64     // an open stream was given the events up to this number
	reason  string     // of the end, once that is visible; the caller adds nothing more
	left    bool       // only the present followers need it; see Leave
	cursors []*cursor
	changed *sync.Cond // of what Wait looks at; nil if nobody waits
}

// maxEventData is the most bytes that the data of an event may have. Some clients break at a line of 65,536.
const maxEventData = 64_000

type entry struct {
	n      uint64
	data   string
	keep   bool // never dropped by the limit
	shared bool // other logs have the same data
}

// entrySize is how many bytes an entry takes without its data.
const entrySize = 32

// size is how many bytes of the heap are freed with e.
func (e entry) size() int {
	if e.shared {
		return 0
	}
	return heapSize(len(e.data))
}

// reader is the follower of a log. Its methods are called with the log locked.
type reader interface {
	wake()         // the log has changed
	working() bool // it may deliver something without being woken again
}

// cursor is how far one reader has come in one log.
type cursor struct {
	events   *eventLog
	reader   reader
	sent     uint64 // the gateway took the events up to this number
	first    uint64 // number of the first event of the run in flight
	inFlight uint64 // and of the last one; 0 if none is in flight
}

func newEventLog(policy *logPolicy) *eventLog {
	return &eventLog{policy: policy, epoch: policy.epoch()}
}

// id is the event ID of number n. The log has an epoch.
func (l *eventLog) id(n uint64) string { return string(l.appendID(nil, n)) }

// maxPosition is more bytes than the ID of an event in a single log has.
const maxPosition = 32

func (l *eventLog) appendID(b []byte, n uint64) []byte {
	return strconv.AppendUint(append(append(b, l.epoch...), '-'), n, 10)
}

// parsePositions returns the number for each epoch in an event ID, or nil if it is no ID of ours.
func parsePositions(id string) map[string]uint64 {
	positions := map[string]uint64{}
	for part := range strings.SplitSeq(id, ".") {
		epoch, number, _ := strings.Cut(part, "-")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil || epoch == "" {
			return nil
		}
		positions[epoch] = n
	}
	return positions
}

// Add adds an event, which nobody sees before Publish, and returns its number.
func (l *eventLog) Add(e entry) (n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	e.n = l.last
	l.entries = append(l.entries, e)
	l.bytes += e.size()
	l.trimLocked()
	return e.n
}

// Restore adds an event of an earlier process under its number. It is visible, and does not count as dropped, as it may
// have been given to somebody.
func (l *eventLog) Restore(e entry) {
	l.mu.Lock()
	l.last, l.visible, l.given = e.n-1, e.n, e.n
	l.mu.Unlock()
	l.Add(e)
}

// Publish lets the followers have the events up to n. A reason says that n is the last one: on a connection that
// follows no other log, connection_close with this reason follows it.
func (l *eventLog) Publish(n uint64, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.visible, l.reason = max(l.visible, n), reason
	for _, c := range l.cursors {
		c.reader.wake()
	}
}

// Wait waits until event n has been given to an open stream, and reports whether it was. It stops waiting when ctx
// ends, when the event is dropped, or when no follower is about to send it.
func (l *eventLog) Wait(ctx context.Context, n uint64) bool {
	working := func(c *cursor) bool { return c.reader.working() }
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.given < n && (l.hasLocked(n) || l.inFlightLocked(n)) && slices.ContainsFunc(l.cursors, working) && ctx.Err() == nil {
		l.changed = cmp.Or(l.changed, sync.NewCond(&l.mu))
		stop := context.AfterFunc(ctx, l.notify)
		l.changed.Wait()
		stop()
	}
	return l.given >= n
}

// notify has Wait look again.
func (l *eventLog) notify() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notifyLocked()
}

func (l *eventLog) notifyLocked() {
	if l.changed != nil {
		l.changed.Broadcast()
		l.changed = nil
	}
}

// logStats is what a log holds at one moment.
type logStats struct {
	kept      int    // events
	waiting   int    // those of them that a fresh connection would get
	bytes     int    // of data that is not shared
	held      int    // bytes of the heap, without shared data
	start     uint64 // the number after which a fresh connection begins
	last      uint64 // the number of the newest event
	followers int
}

func (l *eventLog) stats() logStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return logStats{
		kept:      len(l.entries),
		waiting:   len(l.entries) - l.indexLocked(l.start),
		bytes:     l.bytes,
		held:      l.bytes + cap(l.entries)*entrySize,
		start:     l.start,
		last:      l.last,
		followers: len(l.cursors),
	}
}

// After returns up to most of the events that follow the one with this ID, or that are kept if it is no event of this
// log.
func (l *eventLog) After(id string, most int) (events []event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := parsePositions(id)[l.epoch]
	if n > l.last {
		n = 0
	}
	rest := l.shownLocked(n)
	for _, e := range rest[:min(most, len(rest))] {
		events = append(events, event{ID: l.id(e.n), Name: l.policy.event, Data: e.data})
	}
	return events
}

// DropOldest drops the oldest event without keep, but not the last event. It reports whether there was one.
func (l *eventLog) DropOldest() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.entries) > 0 && l.loseLocked(0, len(l.entries)-1)
}

// All returns the events that are kept.
func (l *eventLog) All() []entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.entries)
}

// Received notes that a browser has the events up to n. Without replay a fresh connection starts after them.
func (l *eventLog) Received(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.given = max(l.given, n)
	if !l.policy.replay && n > l.start {
		l.start = n
		l.trimLocked()
	}
	l.notifyLocked()
}

// Shed drops the events that nobody would get: no fresh connection, and no follower.
func (l *eventLog) Shed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shedLocked(l.start)
}

// Leave says that only the present followers need the log. What all of them have been sent is dropped, from now on.
func (l *eventLog) Leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left = true
	l.leaveLocked()
}

func (l *eventLog) leaveLocked() {
	if l.left && len(l.entries) > 0 && len(l.cursors) > 0 { // without followers all of it is garbage soon
		l.shedLocked(l.last)
	}
}

func (l *eventLog) shedLocked(needed uint64) {
	for _, c := range l.cursors {
		needed = min(needed, c.sent)
	}
	l.dropLocked(0, l.indexLocked(needed))
	l.entries = slices.Clone(l.entries)
}

// indexLocked returns the index of the first event after n.
func (l *eventLog) indexLocked(n uint64) int {
	return sort.Search(len(l.entries), func(i int) bool { return l.entries[i].n > n })
}

// shownLocked returns the visible events after n.
func (l *eventLog) shownLocked(n uint64) []entry {
	from := l.indexLocked(n)
	return l.entries[from:max(from, l.indexLocked(l.visible))]
}

func (l *eventLog) hasLocked(n uint64) bool {
	i := l.indexLocked(n - 1)
	return i < len(l.entries) && l.entries[i].n == n
}

// inFlightLocked reports whether event n is in flight to anybody.
func (l *eventLog) inFlightLocked(n uint64) bool {
	return slices.ContainsFunc(l.cursors, func(c *cursor) bool { return c.first <= n && n <= c.inFlight })
}

// trimLocked drops what the policy does not keep.
func (l *eventLog) trimLocked() {
	limit := l.policy.limit
	if limit == 0 {
		return
	}
	from := l.indexLocked(l.start)
	if from > limit {
		l.dropLocked(0, from-limit)
		from = limit
	}
	for len(l.entries)-from > limit && l.loseLocked(from, len(l.entries)) {
	}
}

// loseLocked drops the oldest event in entries[from:to] without keep, and reports whether there was one. It counts as
// dropped unless somebody was given it. If it is in flight, settle counts it if need be.
func (l *eventLog) loseLocked(from, to int) bool {
	i := slices.IndexFunc(l.entries[from:to], func(e entry) bool { return !e.keep })
	if i < 0 {
		return false
	}
	i += from
	if n := l.entries[i].n; n > l.given && !l.inFlightLocked(n) {
		l.policy.dropped.Inc()
	}
	l.dropLocked(i, i+1)
	l.notifyLocked()
	return true
}

func (l *eventLog) dropLocked(from, to int) {
	for _, e := range l.entries[from:to] {
		l.bytes -= e.size()
	}
	l.entries = slices.Delete(l.entries, from, to)
}

// attach makes r follow the log: after the event that named has for its epoch if there is such an event, and otherwise
// from where a fresh connection starts.
func (l *eventLog) attach(r reader, named map[string]uint64) *cursor {
	l.mu.Lock()
	c := &cursor{events: l, reader: r, sent: l.start}
	if n, ok := named[l.epoch]; ok && n <= l.last {
		c.sent = n
	}
	l.cursors = append(l.cursors, c)
	l.mu.Unlock()
	l.Received(c.sent)
	return c
}

// detach ends the following. Without replay, what was sent and not received is given again to the next connection that
// names no event.
func (c *cursor) detach() {
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	c.events.cursors = slices.DeleteFunc(c.events.cursors, func(other *cursor) bool { return other == c })
	c.events.leaveLocked()
	c.events.notifyLocked()
}

// A run is the events that go to the gateway together: at most maxRun, and at most maxRunBytes of data unless it is a
// single one. A gateway takes far more, so it refuses none of a run for the size of the others.
const (
	maxRun      = 64
	maxRunBytes = 64 << 10
)

// take returns the next events for the reader, at most most of them. They are in flight until settle. If there are none
// it returns the reason of the end, or "" if the log goes on.
func (c *cursor) take(most int) (run []entry, reason string) {
	l := c.events
	l.mu.Lock()
	defer l.mu.Unlock()
	run = l.shownLocked(c.sent)
	if len(run) == 0 {
		return nil, l.reason
	}
	size := 0
	for i, e := range run {
		size += len(e.data)
		if i == most || i > 0 && size > maxRunBytes {
			run = run[:i]
			break
		}
	}
	c.first, c.inFlight = run[0].n, run[len(run)-1].n
	return slices.Clone(run), ""
}

// behind reports whether there is an event after n to be sent. With end set the end of the log counts as one.
func (c *cursor) behind(n uint64, end bool) bool {
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	return end && c.events.reason != "" || len(c.events.shownLocked(n)) > 0
}

// settle notes that the gateway took the first events of a run. If given is set, all that was sent is with an open
// stream.
func (c *cursor) settle(run []entry, taken int, given bool) {
	l := c.events
	l.mu.Lock()
	defer l.mu.Unlock()
	c.inFlight = 0
	if taken > 0 {
		c.sent = run[taken-1].n
	}
	if given {
		l.given = max(l.given, c.sent)
	}
	for _, e := range run[taken:] {
		if e.n > l.given && !l.hasLocked(e.n) && !l.inFlightLocked(e.n) {
			l.policy.dropped.Inc() // dropped by the limit while it was in flight
		}
	}
	l.leaveLocked()
	l.notifyLocked()
}
