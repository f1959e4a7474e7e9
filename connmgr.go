// ConnectionManager: which token is the current connection of which identifier, and send and close by identifier. Tasks
// and versions are not known here. What is to be delivered is in follower.go, the way to the gateway in gateway.go.

package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// sender is the gateway as the ConnectionManager sees it; see gatewayClient.
type sender interface {
	send(token string, events []event, end bool) sendResult
}

// connectRequest is a request for a stream that is to become the connection of an identifier.
type connectRequest struct {
	token       string
	lastEventID string
	taskIDs     []string // of a page stream
	order       requestOrder
	probes      bool   // the gateway can be asked about a token, also before its stream is open
	replaces    string // the connection that it may replace: the gateway has been asked since
}

// owner is told about its connection. Its methods are called without a lock of the ConnectionManager.
type owner interface {
	seen(at time.Time)     // the gateway knew the connection at that time
	ended(until time.Time) // the connection has ended; until when it was there, or zero
}

// ConnectionManager knows which token is the current connection of each identifier. What has been delivered is the
// business of followers.
type ConnectionManager struct {
	gateway sender
	log     *slog.Logger
	met     *backendMetrics
	tracker // counts the followers at work, and other goroutines that send

	failures, skips throttle // limit what is logged about sends

	// mu guards the maps, and is held for work on them alone. Whenever it is free, connections and tokens have the same
	// connections.
	mu          sync.Mutex
	connections map[string]*connection // by identifier
	tokens      map[string]*connection // by token

	// replaced has the identifiers, by token, of streams that could not be told that they were replaced. Beyond
	// maxReplaced they are left to their clients.
	replaced map[string]string
}

const maxReplaced = 10000

// connection is the one current connection of an identifier.
type connection struct {
	identifier string
	token      string
	order      requestOrder
	owner      owner
	checked    time.Time   // when it connected, or when a sweep last asked about it
	suspect    atomic.Bool // a send failed, so the client may have a gap and the stream must end
}

func newConnectionManager(g sender, log *slog.Logger, met *backendMetrics) *ConnectionManager {
	return &ConnectionManager{
		gateway:     g,
		log:         log,
		met:         met,
		connections: map[string]*connection{},
		tokens:      map[string]*connection{},
		replaced:    map[string]string{},
	}
}

// Why a request does not become the connection of an identifier.
var (
	errOutdated = errors.New("a newer request is the connection")
	errAskFirst = errors.New("the gateway must be asked whether it knows the token")
)

// OnConnect makes the token of c the connection of identifier. It returns the token that this replaces, or "". The
// caller gives it to CloseReplaced.
//
// The error is errOutdated if the present connection was asked for later: callbacks may overtake each other. It is
// errAskFirst if c would replace a connection and the gateway has not been asked: the callback may be late, of a
// gateway that has died or given it up.
func (m *ConnectionManager) OnConnect(identifier string, c connectRequest, o owner) (replaced string, err error) {
	now := time.Now()
	m.mu.Lock()
	old := m.connections[identifier]
	if old != nil && old.token != c.token {
		replaced = old.token
	}
	switch {
	case old != nil && c.order.before(old.order):
		m.mu.Unlock()
		return "", errOutdated
	case replaced != "" && c.probes && replaced != c.replaces:
		m.mu.Unlock()
		return "", errAskFirst
	}
	gone := []*connection{m.removeLocked(replaced), m.removeLocked(c.token)} // the second if the same callback came twice
	made := &connection{identifier: identifier, token: c.token, order: c.order, owner: o, checked: now}
	m.connections[identifier], m.tokens[c.token] = made, made
	m.mu.Unlock()
	until := now
	if c.probes {
		until = time.Time{} // Ask has called seen if the old stream is there
	}
	for _, other := range gone {
		if other != nil {
			other.owner.ended(until)
		}
	}
	m.met.connections.with(serviceOf(identifier), "connect").Inc()
	return replaced, nil
}

// Ask reports whether the gateway knows the stream of c, which then may replace the present connection of identifier.
// It asks about that one, too: if it is gone, what it was sent does not count as received.
func (m *ConnectionManager) Ask(identifier string, c *connectRequest) bool {
	m.mu.Lock()
	old := m.connections[identifier]
	m.mu.Unlock()
	if old != nil {
		c.replaces = old.token
		m.Probe(old.token, false)
	}
	return m.gateway.send(c.token, nil, false).err == nil
}

// CloseReplaced ends a stream that has been replaced, with connection_close. It does not wait for that. If the gateway
// does not answer, the next sweep tries again: nobody else knows of the stream any more.
func (m *ConnectionManager) CloseReplaced(identifier, token string) {
	m.spawn(func() {
		r := m.send(identifier, token, []event{closeEvent("replaced")}, true)
		if r.err == nil || errors.Is(r.err, errUnknownToken) {
			return
		}
		m.log.Debug("closing a replaced stream", "identifier", identifier, "token", mask(token), "err", r.err)
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.replaced) < maxReplaced {
			m.replaced[token] = identifier
		}
	})
}

// OnDisconnect removes the connection of token. A token that is unknown, or no longer the current one, removes nothing.
func (m *ConnectionManager) OnDisconnect(token string) {
	c := m.remove(token, time.Now())
	if c == nil {
		m.log.Debug("ignoring a stale disconnect", "token", mask(token))
		return
	}
	m.met.connections.with(serviceOf(c.identifier), "disconnect").Inc()
	m.log.Debug("disconnected", "identifier", c.identifier, "token", mask(token))
}

// remove removes the connection of token, and returns it, or nil if there is none. Its owner is told until when it was
// there; zero if that is not known.
func (m *ConnectionManager) remove(token string, until time.Time) *connection {
	m.mu.Lock()
	c := m.removeLocked(token)
	m.mu.Unlock()
	if c != nil {
		c.owner.ended(until)
	}
	return c
}

func (m *ConnectionManager) removeLocked(token string) *connection {
	c := m.tokens[token]
	if c != nil {
		delete(m.connections, c.identifier)
		delete(m.tokens, token)
	}
	return c
}

// current returns the connection of token, or nil if it is that of nobody any more.
func (m *ConnectionManager) current(token string) *connection {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tokens[token]
}

// Connected reports whether identifier has a connection.
func (m *ConnectionManager) Connected(identifier string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.connections[identifier] != nil
}

// Active counts the connections of each service.
func (m *ConnectionManager) Active() map[string]float64 {
	n := map[string]float64{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for identifier := range m.connections {
		n[serviceOf(identifier)]++
	}
	return n
}

// errSuspended says that a send was not tried: an earlier one failed, and the stream is being ended because of it.
var errSuspended = errors.New("the stream is being ended")

// Send gives events, or only the first of them, to the connection of token: see sendResult. If end is set there is one
// event, and the stream ends after it. Nothing is tried twice. After a failure nobody knows whether the client has the
// event; from then on Send only tries to end the stream, so that the browser comes back and resumes by ID.
func (m *ConnectionManager) Send(token string, events []event, end bool) sendResult {
	c := m.current(token)
	if c == nil {
		return sendResult{err: errUnknownToken}
	}
	if c.suspect.Load() {
		m.Probe(token, true)
		return sendResult{err: errSuspended}
	}
	r := m.send(c.identifier, token, events, end)
	switch {
	case errors.Is(r.err, errUnknownToken) && r.taken == 0:
		m.remove(token, time.Time{})
	case r.err != nil && !errors.Is(r.err, errUnknownToken):
		c.suspect.Store(true)
	}
	if r.taken > 0 {
		r.err = nil // what follows is sent again, and fails then
	}
	return r
}

// send sends events, counts them, and logs a failure.
func (m *ConnectionManager) send(identifier, token string, events []event, end bool) sendResult {
	start := time.Now()
	r := m.gateway.send(token, events, end)
	service := serviceOf(identifier)
	m.met.sendSeconds.with(service).observe(time.Since(start).Seconds())
	m.met.events.with(service, "success").Add(r.taken - r.refused)
	m.met.events.with(service, "error").Add(r.refused)
	if r.err != nil {
		m.met.events.with(service, "error").Inc()
	}
	if r.refused > 0 {
		m.skips.log(m.log, slog.LevelError, "skipping an event that the gateway refuses", "identifier", identifier, "token", mask(token))
	}
	if r.err != nil && !errors.Is(r.err, errUnknownToken) {
		m.failures.log(m.log, slog.LevelError, "sending an event", "identifier", identifier, "token", mask(token), "err", r.err)
	}
	return r
}

// Probe asks the gateway whether the stream of token is there, or ends one that may have a gap: the gateway's
// disconnect callback then removes the connection. If the gateway does not know the stream, its connection is removed
// at once.
func (m *ConnectionManager) Probe(token string, end bool) sendResult {
	asked := time.Now() // when the answer comes it may be gone
	r := m.gateway.send(token, nil, end)
	c := m.current(token)
	switch {
	case errors.Is(r.err, errUnknownToken):
		m.remove(token, time.Time{})
	case r.err != nil:
		m.log.Debug("asking about a stream, or ending it", "token", mask(token), "end", end, "err", r.err)
	case c != nil && !end && !r.buffered:
		c.owner.seen(asked)
	}
	return r
}

// sweepers is how many connections a sweep asks about at the same time.
const sweepers = 8

// Sweep asks the gateway about every connection once an interval, until ctx ends, and removes those that it does not
// know: it may have crashed without disconnect callbacks. The checks are spread over the interval.
func (m *ConnectionManager) Sweep(ctx context.Context, interval time.Duration) {
	every(ctx, interval/8, func() { m.sweep(interval) })
}

func (m *ConnectionManager) sweep(interval time.Duration) {
	var due []*connection
	now := time.Now()
	m.mu.Lock()
	for _, c := range m.connections {
		if now.Sub(c.checked) >= interval {
			c.checked = now
			due = append(due, c)
		}
	}
	replaced := m.replaced
	m.replaced = map[string]string{}
	m.mu.Unlock()
	for token, identifier := range replaced {
		m.CloseReplaced(identifier, token)
	}

	var checks sync.WaitGroup
	slots := make(chan struct{}, sweepers)
	for _, c := range due {
		slots <- struct{}{}
		checks.Go(func() {
			m.Probe(c.token, c.suspect.Load())
			<-slots
		})
	}
	checks.Wait()
}

// Drain waits until no send is under way, or until ctx ends.
func (m *ConnectionManager) Drain(ctx context.Context) {
	if left := m.wait(ctx); left > 0 {
		m.log.Warn("ending with sends under way", "count", left)
	}
}

// EndAll ends every stream without connection_close, so that the browsers come back: to the next backend.
func (m *ConnectionManager) EndAll(ctx context.Context) {
	m.mu.Lock()
	tokens := slices.Collect(maps.Keys(m.tokens))
	m.mu.Unlock()
	for _, token := range tokens {
		m.spawn(func() { m.gateway.send(token, nil, true) })
	}
	m.Drain(ctx)
}
