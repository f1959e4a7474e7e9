// ConnectionManager: which token is the current connection of which identifier, and send and close by identifier. Tasks
// and versions are not known here; what must be delivered is in follower.go, the way to the gateway in gateway.go.

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

// connectRequest is a stream that wants to be the connection of an identifier.
type connectRequest struct {
	token       string
	lastEventID string
	taskIDs     []string // of a page stream
	order       requestOrder
	probes      bool   // the gateway says whether it knows a token, also before the stream is open
	replaces    string // the token that it may replace, since the gateway was asked
}

// owner is who a connection is for. It is called without a lock.
type owner interface {
	seen(at time.Time)     // the gateway knows the connection
	ended(until time.Time) // the connection is no more; until when it was there, or zero
}

// ConnectionManager knows which token is the current connection of each identifier. It makes no promise about what was
// delivered; followers do.
type ConnectionManager struct {
	gateway  sender
	log      *slog.Logger
	met      *backendMetrics
	failures throttle // of what is logged about sends
	tracker           // the goroutines of followers, and others that send

	// mu guards the maps; under it there is map work only. Whenever it is free, connections[id].token == t if and only
	// if tokens[t] == id.
	mu          sync.Mutex
	connections map[string]*connection // by identifier
	tokens      map[string]string      // identifier by token

	// replaced has the identifiers of streams that could not be told of their end, by token. What is beyond maxReplaced
	// is left to the client.
	replaced map[string]string
}

const maxReplaced = 10000

// connection is the one current connection of an identifier.
type connection struct {
	token   string
	order   requestOrder
	owner   owner
	checked time.Time   // when it connected, or a sweep last asked for it
	suspect atomic.Bool // a send failed: the client may have a gap, so the stream must end
}

func newConnectionManager(g sender, log *slog.Logger, met *backendMetrics) *ConnectionManager {
	return &ConnectionManager{
		gateway:     g,
		log:         log,
		met:         met,
		failures:    throttle{interval: time.Minute},
		connections: map[string]*connection{},
		tokens:      map[string]string{},
		replaced:    map[string]string{},
	}
}

// Why a stream does not become the connection of an identifier.
var (
	errOutdated = errors.New("a newer request is the connection")
	errAskFirst = errors.New("the gateway must be asked whether it knows the token")
)

// OnConnect makes the token of c the connection of identifier. It returns the token that this replaces, or "", which
// the caller gives to CloseReplaced.
//
// A request that is older than the present connection's is errOutdated: callbacks may overtake each other. One that
// would replace a connection is errAskFirst unless its gateway was asked, for that may have died or given the callback
// up.
func (m *ConnectionManager) OnConnect(identifier string, c connectRequest, o owner) (replaced string, err error) {
	now := time.Now()
	m.mu.Lock()
	old := m.connections[identifier]
	switch {
	case old != nil && c.order.before(old.order):
		err = errOutdated
	case old != nil && old.token != c.token && c.probes && old.token != c.replaces:
		err = errAskFirst
	}
	if err != nil {
		m.mu.Unlock()
		return "", err
	}
	if old != nil && old.token != c.token {
		replaced = old.token
		m.removeLocked(identifier, replaced)
	}
	same := m.removeLocked(m.tokens[c.token], c.token) // something repeated a callback
	m.connections[identifier] = &connection{token: c.token, order: c.order, owner: o, checked: now}
	m.tokens[c.token] = identifier
	m.mu.Unlock()
	until := now
	if c.probes {
		until = time.Time{} // Ask has seen, or not
	}
	if replaced != "" {
		old.owner.ended(until)
	}
	if same != nil {
		same.owner.ended(until)
	}
	m.met.connections.with(serviceOf(identifier), "connect").Inc()
	return replaced, nil
}

// Ask reports whether the gateway knows the stream of c, which then may replace the present connection of identifier.
// It asks about that, too: who comes after a dead one gets what that may have lost.
func (m *ConnectionManager) Ask(identifier string, c *connectRequest) bool {
	m.mu.Lock()
	old := m.connections[identifier]
	m.mu.Unlock()
	if old != nil {
		c.replaces = old.token
		m.Probe(identifier, old.token)
	}
	return m.gateway.send(c.token, nil, false).err == nil
}

// CloseReplaced tells a replaced stream that it is at its end. It returns at once. If the gateway does not answer, the
// next sweep tries again: nobody else knows of that stream any more.
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
	m.mu.Lock()
	identifier := m.tokens[token]
	m.mu.Unlock()
	if !m.remove(identifier, token, time.Now()) {
		m.log.Debug("ignoring a stale disconnect", "token", mask(token))
		return
	}
	m.met.connections.with(serviceOf(identifier), "disconnect").Inc()
	m.log.Debug("disconnected", "identifier", identifier, "token", mask(token))
}

// remove removes the connection of identifier if it is still that of token, and tells its owner until when it was known
// to be there, or zero. It reports whether it did.
func (m *ConnectionManager) remove(identifier, token string, until time.Time) bool {
	m.mu.Lock()
	c := m.removeLocked(identifier, token)
	m.mu.Unlock()
	if c != nil {
		c.owner.ended(until)
	}
	return c != nil
}

// removeLocked returns the connection that it removed, or nil.
func (m *ConnectionManager) removeLocked(identifier, token string) *connection {
	c := m.connections[identifier]
	if c == nil || c.token != token {
		return nil
	}
	delete(m.connections, identifier)
	delete(m.tokens, token)
	return c
}

// current returns the connection of identifier if it is that of token, or nil.
func (m *ConnectionManager) current(identifier, token string) *connection {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.connections[identifier]; c != nil && c.token == token {
		return c
	}
	return nil
}

// Connected reports whether identifier has a connection.
func (m *ConnectionManager) Connected(identifier string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.connections[identifier]
	return ok
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

// errSuspended says that a send was not tried: an earlier one failed, and the stream is being ended for it.
var errSuspended = errors.New("the stream is being ended")

// Send gives events to the connection of identifier, if that is still token, or only the first ones: see sendResult. If
// end is set, there is one event, after which the stream ends. Nothing is tried twice. After a failure the client may
// lack an event, or have it; from then on Send only tries to end the stream, so that the browser comes back and resumes
// by ID.
func (m *ConnectionManager) Send(identifier, token string, events []event, end bool) sendResult {
	c := m.current(identifier, token)
	if c == nil {
		return sendResult{err: errUnknownToken}
	}
	if c.suspect.Load() {
		m.endSuspect(identifier, token)
		return sendResult{err: errSuspended}
	}
	r := m.send(identifier, token, events, end)
	switch {
	case errors.Is(r.err, errUnknownToken) && r.taken == 0:
		m.remove(identifier, token, time.Time{})
	case r.err != nil && !errors.Is(r.err, errUnknownToken):
		c.suspect.Store(true)
	}
	if r.taken > 0 {
		r.err = nil // the next Send says so
	}
	return r
}

// send posts events, and counts and logs how it went.
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
		m.failures.log(m.log, slog.LevelError, "skipping an event that the gateway refuses", "identifier", identifier, "token", mask(token))
	}
	if r.err != nil && !errors.Is(r.err, errUnknownToken) {
		m.failures.log(m.log, slog.LevelError, "sending an event", "identifier", identifier, "token", mask(token), "err", r.err)
	}
	return r
}

// Probe asks the gateway for a stream. If it does not know the token, the connection of identifier is removed, if it is
// still that one.
func (m *ConnectionManager) Probe(identifier, token string) sendResult {
	asked := time.Now() // the answer may be late
	r := m.ask(identifier, token, false)
	if c := m.current(identifier, token); c != nil && r.err == nil && !r.buffered {
		c.owner.seen(asked)
	}
	return r
}

// ask asks the gateway for a stream, or ends it, and removes its connection if the gateway does not know it.
func (m *ConnectionManager) ask(identifier, token string, end bool) sendResult {
	r := m.gateway.send(token, nil, end)
	if errors.Is(r.err, errUnknownToken) {
		m.remove(identifier, token, time.Time{})
	}
	return r
}

// endSuspect ends a stream that may have a gap. The gateway's disconnect callback, or its 404, then removes the
// connection.
func (m *ConnectionManager) endSuspect(identifier, token string) {
	if r := m.ask(identifier, token, true); r.err != nil {
		m.log.Debug("ending a stream that may have a gap", "identifier", identifier, "token", mask(token), "err", r.err)
	}
}

// sweepers is how many connections a sweep asks for at the same time.
const sweepers = 8

// Sweep asks the gateway, until ctx ends, for every connection about once an interval: what it does not know any more,
// after a crash without disconnect callbacks, is removed. It runs several times an interval, which spreads the checks.
func (m *ConnectionManager) Sweep(ctx context.Context, interval time.Duration) {
	every(ctx, interval/8, func() { m.sweep(interval) })
}

func (m *ConnectionManager) sweep(interval time.Duration) {
	due := map[string]*connection{}
	now := time.Now()
	m.mu.Lock()
	for identifier, c := range m.connections {
		if now.Sub(c.checked) >= interval {
			c.checked = now
			due[identifier] = c
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
	for identifier, c := range due {
		slots <- struct{}{}
		checks.Go(func() {
			if c.suspect.Load() {
				m.endSuspect(identifier, c.token)
			} else {
				m.Probe(identifier, c.token)
			}
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

// EndAll ends every stream, without the event that would keep its browser from coming back: to the backend that takes
// this one's place.
func (m *ConnectionManager) EndAll(ctx context.Context) {
	m.mu.Lock()
	tokens := slices.Collect(maps.Keys(m.tokens))
	m.mu.Unlock()
	for _, token := range tokens {
		m.spawn(func() { m.gateway.send(token, nil, true) })
	}
	m.Drain(ctx)
}
