// Delivery: a follower gives one connection the events of a log, each once and in
// order. Tasks and versions are not known here. The events are in eventlog.go, the
// connection is in connmgr.go.

package main

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// settleTime is how long a connection must have been open for what it was given
// to count as received. A browser that leaves sooner may not have read a byte.
const settleTime = time.Second

// follower delivers the events of a log to one connection, that is, to one
// token. One goroutine at a time does so, one run of events after the other, and
// nothing is tried twice. When the connection is replaced its follower is told,
// and from then on moves no position: a send that is still under way reaches
// neither the new connection nor what that is given.
type follower struct {
	identifier string
	token      string
	conns      *ConnectionManager
	state      atomic.Int32 // idle, working, or workingAgain

	cursor *cursor // set when the delivery begins
	probes bool    // the gateway can be asked about the stream before it is open

	// For deliver alone.
	closed bool // the connection was given the end
	asked  bool // the gateway was asked about buffered in vain

	mu       sync.Mutex // guards the rest
	since    time.Time  // when the connection was opened, as far as is known
	buffered bool       // the last events wait at the gateway, which may still drop them
	stopped  bool       // the connection has ended
}

// States of a follower: whether deliver runs, and is to look once more.
const (
	idle int32 = iota
	working
	workingAgain
)

// follow makes the stream of c the connection of identifier, in place of any
// other, and returns the event that begins it. Delivery goes on after its last
// event ID if that is an event of log, and from the start of log otherwise. A
// stream that was asked for before the present connection is the one that is
// replaced: the event that it begins with ends it. The error is errAskFirst.
func follow(conns *ConnectionManager, identifier string, c connectRequest, log *eventLog) (open event, end bool, err error) {
	f := &follower{identifier: identifier, token: c.token, conns: conns, probes: c.probes, since: time.Now()}
	replaced, err := conns.OnConnect(identifier, c, f)
	if err == errOutdated {
		return closeEvent("replaced"), true, nil
	}
	if err != nil {
		return event{}, false, err
	}
	position := f.begin(log, c.lastEventID)
	if replaced != "" {
		conns.CloseReplaced(identifier, replaced)
	}
	return event{ID: position, Name: "connection_open", Data: `{"status":"connected"}`}, false, nil
}

// begin starts the delivery and returns the ID of the event after which it goes
// on.
func (f *follower) begin(log *eventLog, lastEventID string) (position string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cursor = log.attach(f, parsePositions(lastEventID))
	position = log.id(f.cursor.sent)
	if f.stopped { // replaced meanwhile
		f.cursor.detach(time.Time{})
		return position
	}
	f.wake()
	return position
}

// seen notes that the gateway knows the connection.
func (f *follower) seen(at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cursor != nil {
		f.cursor.seen(at)
	}
}

// ended stops the delivery: the connection is no more. It was there until the
// given time; if that is not known, it is zero.
func (f *follower) ended(until time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return
	}
	f.stopped = true
	if f.cursor != nil {
		f.cursor.detach(until)
	}
}

// wake has deliver look for what is new. It takes no lock, so that a log may
// call it.
func (f *follower) wake() {
	for {
		switch {
		case f.state.CompareAndSwap(idle, working):
			f.conns.background(f.deliver)
			return
		case f.state.CompareAndSwap(working, workingAgain), f.state.Load() == workingAgain:
			return
		}
	}
}

func (f *follower) working() bool { return f.state.Load() != idle }

// rest ends deliver, unless it was woken meanwhile.
func (f *follower) rest() bool {
	if !f.state.CompareAndSwap(working, idle) {
		f.state.Store(working)
		return false
	}
	f.cursor.log.notify()
	return true
}

// deliver sends until the connection has everything or is no more, or until
// there is nothing left to try.
func (f *follower) deliver() {
	most := 1
	for {
		run, reason := f.cursor.take(most)
		end := reason != "" && !f.closed
		if len(run) == 0 && !end {
			if !f.awaitOpen() && f.rest() {
				return
			}
			continue
		}
		events := f.events(run)
		if end {
			events = []event{closeEvent(reason)}
		}
		began := time.Now()
		r := f.conns.Send(f.identifier, f.token, events, end)
		most = max(1, min(2*r.taken, maxRun))
		f.closed = end && r.err == nil
		if !f.settle(run, r, began) && f.rest() {
			return
		}
	}
}

func (f *follower) events(run []entry) []event {
	log := f.cursor.log
	events := make([]event, len(run))
	for i, e := range run {
		events[i] = event{ID: log.id(e.n), Name: log.policy.event, Data: e.data}
	}
	return events
}

// settle notes what became of a run, whose send began at that time, or of the
// end, which is a run without events. It reports whether to go on. After a failure that is so if there is
// more to send: trying to ends the stream, so that the browser comes back for
// what it may lack.
func (f *follower) settle(run []entry, r sendResult, began time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.err == nil {
		if f.buffered && !r.buffered { // it has opened since
			f.since = time.Now()
		}
		f.buffered, f.asked = r.buffered, false
	}
	f.cursor.settle(run, min(r.taken, len(run)), began, f.settlesLocked())
	switch {
	case r.err == nil:
		return true
	case r.err == errSuspended, errors.Is(r.err, errUnknownToken):
		return false
	}
	return len(run) > 0 && f.cursor.behind(run[0].n)
}

// settlesLocked is when the connection counts as having received what it was
// given: zero for not yet known.
func (f *follower) settlesLocked() time.Time {
	if f.buffered {
		return time.Time{}
	}
	return f.since.Add(settleTime)
}

// An event that the gateway buffers until its stream is open is lost with that
// stream if the client leaves first. Whether it opened is asked a few times, for
// as long as a connect callback may take.
const (
	openLimit = 5 * time.Second
	openPause = 20 * time.Millisecond
)

// awaitOpen finds out whether buffered events are with the browser now. It
// returns false at once if there are none, or if nobody needs to know.
func (f *follower) awaitOpen() bool {
	f.mu.Lock()
	waiting := f.buffered && !f.stopped && !f.asked && !f.cursor.log.policy.replay
	f.mu.Unlock()
	if !waiting {
		return false
	}
	tries := int(openLimit / openPause)
	if !f.probes { // it would write an empty event
		time.Sleep(openLimit)
		tries = 1
	}
	r := sendResult{buffered: true}
	for ; tries > 0; tries-- {
		if r = f.conns.Probe(f.identifier, f.token); r.err != nil || !r.buffered {
			break
		}
		time.Sleep(openPause)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = true
	if r.err == nil && !r.buffered {
		f.buffered, f.since = false, time.Now()
		f.cursor.settle(nil, 0, time.Time{}, f.settlesLocked())
	}
	return true
}
