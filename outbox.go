// The events of one identifier and their delivery to its one connection. Tasks and
// versions are not known here; the connection itself is in connmgr.go.

package main

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// outboxPolicy is what the outboxes of one service have in common.
type outboxPolicy struct {
	event string // name of the events
	epoch string // first part of their IDs; "" for events without ID

	// replay makes every fresh connection start at the first event. Without
	// it, one starts at the first event that no connection has taken yet.
	replay bool
	// limit is how many events are kept that a fresh connection would get, and
	// how many others: the gateway took them, but a browser that lost its
	// connection may ask for them by ID. 0 means no limit. Beyond it the oldest
	// that is not marked goes; dropped is told of those that nobody was given.
	limit   int
	dropped func(n int)
}

// renewed returns the same policy with a new epoch. A service that forgets
// outboxes makes later ones with it: one for the same identifier counts from
// 1 again, and must not take an ID of the forgotten one for its own.
func (p *outboxPolicy) renewed() *outboxPolicy {
	next := *p
	next.epoch = newEpoch()
	return &next
}

// outbox is the ordered, numbered log of the events of one identifier, and
// their delivery to its one connection.
//
// For each connection one goroutine at a time sends, one run of events after
// the other. It works on a token and a position that were read together, and
// moves the position only while that token is still the connection. So a
// send that was under way when a new connection came reaches neither that
// connection nor its position.
//
// Lock order: mu, then the ConnectionManager's.
type outbox struct {
	identifier string
	conns      *ConnectionManager
	policy     *outboxPolicy

	mu     sync.Mutex
	log    []entry // ascending numbers
	bytes  int     // that their data takes, as far as it is not shared
	last   uint64  // number of the newest event; they count from 1
	start  uint64  // a fresh connection gets what is after it
	given  uint64  // the last number that an open stream was given
	reason string  // of the end; once set, nothing more is appended

	token   string // the connection that the rest is about; "" for none
	order   requestOrder
	sent    uint64 // the last number that token was given
	flying  uint64 // the last number of the run that is under way to token; 0 for none
	closed  bool   // token was given the end
	stalled bool   // the last send failed; the next event tries again
	unsure  bool   // events up to sent are with the gateway, which may still drop them
	sender  string // the token that deliver runs for; only if it is token does it count

	changed chan struct{} // closed when what Wait looks at changes; nil while nobody waits
}

type entry struct {
	n      uint64
	data   string
	keep   bool // never dropped by the limit
	shared bool // its data is in other outboxes, too
}

// entrySize is how many bytes an entry takes without its data.
const entrySize = 32

// size is how many bytes of data only this outbox holds.
func (e entry) size() int {
	if e.shared {
		return 0
	}
	return heapSize(len(e.data))
}

func newOutbox(identifier string, conns *ConnectionManager, policy *outboxPolicy) *outbox {
	return &outbox{identifier: identifier, conns: conns, policy: policy}
}

// id is the event ID of number n.
func (o *outbox) id(n uint64) string {
	if o.policy.epoch == "" {
		return ""
	}
	return o.policy.epoch + "-" + strconv.FormatUint(n, 10)
}

// parseID returns the number in an ID of this epoch.
func (o *outbox) parseID(id string) (n uint64, ok bool) {
	epoch, number, ok := strings.Cut(id, "-")
	if !ok || epoch == "" || epoch != o.policy.epoch {
		return 0, false
	}
	n, err := strconv.ParseUint(number, 10, 64)
	return n, err == nil
}

// Append adds an event and returns its number, or 0 after End. It does not
// wait for its delivery.
func (o *outbox) Append(data string, keep bool) (n uint64) {
	return o.add(entry{data: data, keep: keep})
}

// AppendShared is Append for data that other outboxes get, too.
func (o *outbox) AppendShared(data string) (n uint64) {
	return o.add(entry{data: data, shared: true})
}

func (o *outbox) add(e entry) (n uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.reason != "" {
		return 0
	}
	o.last++
	e.n = o.last
	o.log = append(o.log, e)
	o.bytes += e.size()
	o.trimLocked()
	o.stalled = false
	o.wakeLocked()
	return o.last
}

// End makes connection_close with this reason follow the last event on every
// connection, which ends it.
func (o *outbox) End(reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reason = reason
	o.stalled = false
	o.wakeLocked()
}

// Connect makes a stream the connection, in place of any other, and returns
// the event that begins it. Delivery goes on after its last event ID if that
// is an event of this outbox, and from the start otherwise. A stream that was
// asked for before the connection is the one that is replaced: the event it
// begins with ends it.
func (o *outbox) Connect(c connectRequest) (open event, end bool) {
	o.mu.Lock()
	if c.order.before(o.order) && o.conns.Connected(o.identifier) {
		o.mu.Unlock()
		return closeEvent("replaced"), true
	}
	o.sent = o.start
	if n, ok := o.parseID(c.lastEventID); ok && n <= o.last {
		o.sent = n
		o.confirmLocked(n)
	}
	replaced := o.conns.OnConnect(o.identifier, c.token, c.url) // in one order with token
	o.token, o.order, o.closed, o.stalled, o.unsure = c.token, c.order, false, false, false
	o.flying = 0
	o.trimLocked()
	o.notifyLocked()
	open = event{ID: o.id(o.sent), Name: "connection_open", Data: `{"status":"connected"}`}
	o.wakeLocked()
	o.mu.Unlock()
	if replaced != "" {
		o.conns.CloseReplaced(o.identifier, replaced)
	}
	return open, false
}

// Wait waits until event n is known to be with an open stream, which it is
// never with replay. It returns false when ctx ends, when the event was
// dropped, or when nobody is at it: there is no connection, or it failed.
func (o *outbox) Wait(ctx context.Context, n uint64) bool {
	for {
		o.mu.Lock()
		done := o.start >= n
		i := o.indexLocked(n - 1)
		dropped := i == len(o.log) || o.log[i].n != n
		busy := o.token != "" && o.sender == o.token && !dropped
		if done || !busy {
			o.mu.Unlock()
			return done
		}
		if o.changed == nil {
			o.changed = make(chan struct{})
		}
		changed := o.changed
		o.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

// Size returns how many events are kept, how many of them a fresh connection
// would get, and how many bytes of data they have that is not shared.
func (o *outbox) Size() (kept, waiting, bytes int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.log), len(o.log) - o.indexLocked(o.start), o.bytes
}

// Held returns how many bytes of the heap the events take, as far as they are not shared.
func (o *outbox) Held() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bytes + cap(o.log)*entrySize
}

// After returns at most so many of the events that follow the one with this ID: from the
// first that is kept, if it is none of this outbox.
func (o *outbox) After(id string, most int) (events []event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, _ := o.parseID(id)
	if n > o.last {
		n = 0
	}
	rest := o.log[o.indexLocked(n):]
	for _, e := range rest[:min(most, len(rest))] {
		events = append(events, event{ID: o.id(e.n), Name: o.policy.event, Data: e.data})
	}
	return events
}

// DropOldest drops the oldest event that is not marked, not under way and not the last
// one. It reports whether there was one.
func (o *outbox) DropOldest() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.dropOneLocked(o.indexLocked(max(o.start, o.flying)), len(o.log)-1)
}

// Shed drops the events that neither a fresh connection nor this one would
// get.
func (o *outbox) Shed() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dropLocked(0, o.indexLocked(min(o.start, o.sent)))
	o.log = slices.Clone(o.log)
}

// indexLocked returns the index of the first event after n.
func (o *outbox) indexLocked(n uint64) int {
	i, _ := slices.BinarySearchFunc(o.log, n+1, func(e entry, n uint64) int {
		return int(int64(e.n - n))
	})
	return i
}

// trimLocked drops what the policy does not keep, except what is under way.
func (o *outbox) trimLocked() {
	limit := o.policy.limit
	if limit == 0 {
		return
	}
	from := o.indexLocked(o.start)
	if from > limit {
		o.dropLocked(0, from-limit)
		from = limit
	}
	from = max(from, o.indexLocked(o.flying))
	for len(o.log)-from > limit && o.dropOneLocked(from, len(o.log)) {
	}
}

// dropOneLocked drops the oldest event between two indexes that is not marked, and reports
// whether there was one.
func (o *outbox) dropOneLocked(from, to int) bool {
	i := slices.IndexFunc(o.log[min(from, to):to], func(e entry) bool { return !e.keep })
	if i < 0 {
		return false
	}
	if o.log[from+i].n > o.given {
		o.policy.dropped(1)
	}
	o.dropLocked(from+i, from+i+1)
	o.notifyLocked()
	return true
}

func (o *outbox) dropLocked(from, to int) {
	for _, e := range o.log[from:to] {
		o.bytes -= e.size()
	}
	o.log = slices.Delete(o.log, from, to)
}

// confirmLocked notes that an open stream was given the events up to n, so
// that they need not be sent to a fresh connection any more.
func (o *outbox) confirmLocked(n uint64) {
	o.given = max(o.given, n)
	if !o.policy.replay && n > o.start {
		o.start = n
		o.trimLocked()
	}
}

// wakeLocked starts a sender for token if there is something to send and none
// is at it.
func (o *outbox) wakeLocked() {
	if o.token == "" || o.sender == o.token || !o.moreLocked() {
		return
	}
	o.sender = o.token
	token := o.token
	o.conns.background(func() { o.deliver(token) })
}

// moreLocked reports whether token lacks anything.
func (o *outbox) moreLocked() bool {
	return !o.stalled && (o.indexLocked(o.sent) < len(o.log) || o.reason != "" && !o.closed)
}

// A run is what goes to the gateway at once: more with each success, up to so
// many events or bytes. Their JSON is far from its limits, so that it refuses
// none from the middle of a run.
const (
	maxRun      = 64
	maxRunBytes = 64 << 10
)

// deliver sends to token until it has everything or is not the connection
// any more.
func (o *outbox) deliver(token string) {
	most := 1
	for {
		o.mu.Lock()
		if o.token != token {
			if o.sender == token { // and not already another's
				o.sender = ""
			}
			o.mu.Unlock()
			return
		}
		if !o.moreLocked() {
			if o.unsure && !o.stalled {
				o.mu.Unlock()
				o.awaitOpen(token)
				continue
			}
			o.sender = ""
			o.notifyLocked()
			o.mu.Unlock()
			return
		}
		run, reason := slices.Clone(o.runLocked(most)), o.reason
		if len(run) > 0 {
			o.flying = run[len(run)-1].n
		}
		o.mu.Unlock()

		events := make([]event, 0, max(len(run), 1))
		for _, e := range run {
			events = append(events, event{ID: o.id(e.n), Name: o.policy.event, Data: e.data})
		}
		if len(run) == 0 {
			events = append(events, closeEvent(reason))
		}
		taken, result := o.conns.Send(o.identifier, token, events, len(run) == 0)
		most = max(1, min(2*taken, maxRun))

		o.mu.Lock()
		if o.token == token {
			o.settleLocked(run, taken, result)
		}
		o.mu.Unlock()
	}
}

// runLocked returns the next events for token, most at most. After the last
// there are none.
func (o *outbox) runLocked(most int) []entry {
	run := o.log[o.indexLocked(o.sent):]
	size := 0
	for i, e := range run {
		size += len(e.data)
		if i == most || i > 0 && size > maxRunBytes {
			return run[:i]
		}
	}
	return run
}

// settleLocked notes what became of a run on token, of which so many events
// were taken, or of the end, which is a run without events.
func (o *outbox) settleLocked(run []entry, taken int, result delivery) {
	n, end := o.sent, len(run) == 0
	if !end {
		n = run[max(taken-1, 0)].n
	}
	switch result {
	case delivered:
		o.sent, o.closed, o.unsure = n, end, false
		o.confirmLocked(n)
	case heldBack:
		o.sent, o.closed, o.unsure = n, end, !o.policy.replay
	case disconnected:
		o.token = ""
	case failed:
		// What comes next, if anything does, ends the stream: see Send.
		o.stalled = end || o.reason == "" && o.indexLocked(n) == len(o.log)
	case suspended:
		o.stalled = true
	}
	o.flying = 0
	o.trimLocked()
	o.notifyLocked()
}

// An event that the gateway held back until its stream is open is lost with
// that stream if the client leaves first. Whether it opened is asked a few
// times, for as long as a connect callback may take.
const (
	openLimit = 5 * time.Second
	openPause = 20 * time.Millisecond
)

// awaitOpen finds out whether the events that were held back are with the
// browser now.
func (o *outbox) awaitOpen(token string) {
	result := heldBack
	for range openLimit / openPause {
		result = o.conns.Probe(o.identifier, token)
		if result != heldBack {
			break
		}
		time.Sleep(openPause)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.token != token {
		return
	}
	o.unsure = false
	switch result {
	case delivered:
		o.confirmLocked(o.sent)
	case disconnected:
		o.token = ""
	}
	o.notifyLocked()
}

func (o *outbox) notifyLocked() {
	if o.changed != nil {
		close(o.changed)
		o.changed = nil
	}
}
