// Page streams: one connection that carries the versions for a request_id and the
// events of any number of tasks. Tokens are not known here; follower.go delivers
// the events of all logs.

package main

import "slices"

// maxPageTasks is how many tasks a page stream may follow.
const maxPageTasks = 50

// PageService lets pages follow tasks and versions.
type PageService struct {
	conns   *ConnectionManager
	tasks   *TaskService
	version *VersionService
}

var errTooManyTasks = badRequest("too_many_tasks", "a page stream follows at most 50 tasks")

// pageStream is a page stream that is asked for: the service for one set of tasks.
type pageStream struct {
	*PageService
	taskIDs []string
}

// OnConnect lets a stream follow the versions for a request_id, and tasks. Of a
// task that is not known the page is told so; its events follow if it is made
// while the page is connected.
func (p pageStream) OnConnect(id string, c connectRequest) (open event, end bool, err error) {
	identifier, err := newIdentifier(servicePage, id)
	if err != nil {
		return event{}, false, err
	}
	taskIDs := slices.Compact(slices.Sorted(slices.Values(p.taskIDs)))
	for _, taskID := range taskIDs {
		if _, err := newIdentifier(serviceTask, taskID); err != nil {
			return event{}, false, err
		}
	}
	if len(taskIDs) > maxPageTasks {
		return event{}, false, errTooManyTasks
	}
	if p.tasks.crowded(taskIDs) {
		return event{}, false, errNoRoom
	}
	versions, err := p.version.follow(id)
	if err != nil {
		return event{}, false, err
	}
	f := &follower{identifier: identifier, page: true}
	f.onEnd = func() { p.tasks.unwatch(taskIDs, f) }
	return f.connect(p.conns, c, func() []*eventLog { return append(p.tasks.watch(taskIDs, f), versions) })
}
